"""Matrix products by weight format and number of rows, and what stands right before and behind them."""
