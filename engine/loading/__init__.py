"""From a name to weights: checkpoints, quantized ones too, and random weights of published dimensions."""
