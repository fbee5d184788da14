"""How the bundled model was made: `python -m engine.bundled.train prepare`, then `train`, `export`, `evaluate`.

`prepare` needs the standard library's sources with its tests (CPython built from source carries both); `train` needs
only the arrays that `prepare` wrote, so it can run on another machine. README.md holds the figures of the shipped run.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from engine.bundled import MODEL_DIR
from engine.bundled.corpus import MAX_LENGTH, VOCAB_SIZE, Tokens, batches, prepare, windows
from engine.bundled.evaluate import evaluate

CORPUS = Path(".corpus/stdlib.npz")
CHECKPOINT = Path(".corpus/checkpoint")
SHARD = "12MB"  # the checkpoint may travel in pieces; `export` joins them


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters; every field is also an option of `train`."""

    epochs: float = 24.0
    minutes: float = 4.0  # training ends after this time at the latest, with the schedule shortened to match
    rows: int = 32  # sequences per step
    context: int = MAX_LENGTH  # tokens per sequence
    aligned: float = 0.5  # share of the sequences that begin where a line does
    muon: int = 1  # 0: AdamW alone, for a short stage on a CPU, where Muon's arithmetic would take most of the time
    learning_rate: float = 6e-3
    weight_decay: float = 0.2
    dropout: float = 0.15
    warmup: float = 0.02  # share of the run
    decay: float = 0.6  # share of the run, at its end, in which the rate falls linearly to zero
    evaluations: int = 40
    seed: int = 0

    def rate(self, progress: float) -> float:
        """Learning rate at `progress` in [0, 1] of the run."""
        return self.learning_rate * min(1.0, progress / self.warmup, (1.0 - progress) / self.decay)


def model_config() -> LlamaConfig:
    """The architecture: 11 million parameters, with dimensions that quantization groups of 64 and 128 divide."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def build(recipe: Recipe, start: Path | None, device: torch.device) -> LlamaForCausalLM:
    """A model, fresh or from `start`, with dropout on the embedding and on each residual branch; float32 weights."""
    torch.manual_seed(recipe.seed)
    fresh = LlamaForCausalLM(model_config())
    model = (LlamaForCausalLM.from_pretrained(start, dtype=torch.float32) if start else fresh).to(device)

    def drop(module: nn.Module, _: object, output: Tensor) -> Tensor:
        return functional.dropout(output, recipe.dropout, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
        if device.type == "cuda":
            layer.compile()
    return model


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the layers' matrices unless `recipe.muon` is 0, AdamW for everything else.

    With "match_rms_adamw" (Liu et al., arXiv:2502.16982) both take the same learning rate.
    """
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    others = [model.model.embed_tokens.weight]
    found: list[torch.optim.Optimizer] = []
    if recipe.muon:
        found.append(torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"))
    else:
        others += matrices
    groups = [{"params": others, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return [*found, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]


def loss_of(model: LlamaForCausalLM, batch: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
    """Mean next-token loss in nats over a batch [rows, context + 1], in bf16 with float32 weights."""
    tokens = torch.from_numpy(batch).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        logits = cast(Tensor, model(tokens[:, :-1], use_cache=False).logits)
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, held_out: Tokens, recipe: Recipe) -> float:
    """Mean loss over the held-out tokens that fill whole batches."""
    model.eval()
    losses = [loss_of(model, batch) for batch in windows(held_out, recipe.rows, recipe.context)]
    model.train()
    return torch.stack(losses).mean().item()


def save(model: LlamaForCausalLM, stages: list[dict[str, object]], folder: Path) -> None:
    """Write the weights in bf16, and `training.json`: one record for each stage that led to them."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder, max_shard_size=SHARD)
    (folder / "training.json").write_text(json.dumps({"stages": stages}, indent=1) + "\n")


def train(recipe: Recipe, corpus: Path, start: Path | None, folder: Path, device: torch.device) -> None:
    """Train, from scratch or from the checkpoint `start`, and keep in `folder` the weights of lowest held-out loss."""
    torch.set_float32_matmul_precision("high")
    with np.load(corpus) as arrays:
        documents = np.split(arrays["train"], np.cumsum(arrays["train_lengths"])[:-1])
        held_out: Tokens = arrays["held_out"]
        line_ends: list[int] = arrays["line_ends"].tolist()
    earlier = json.loads((start / "training.json").read_text())["stages"] if start else []
    model = build(recipe, start, device)
    steppers = optimizers(model, recipe)
    tokens_per_step = recipe.rows * recipe.context
    steps = max(1, round(recipe.epochs * sum(map(len, documents)) / tokens_per_step))
    evaluate_every = max(1, steps // recipe.evaluations)
    source = batches(documents, line_ends, recipe.aligned, recipe.rows, recipe.context, recipe.seed)
    curve: list[dict[str, float]] = []
    best = float("inf")
    recent: list[Tensor] = []
    begin = time.monotonic()
    progress, step = 0.0, 0
    with tqdm(total=1.0, desc="train", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", mininterval=5) as bar:
        while progress < 1.0:
            loss = loss_of(model, next(source))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = recipe.rate(progress)
                stepper.step()
                stepper.zero_grad(set_to_none=True)
            recent.append(loss.detach())
            step += 1
            seconds = time.monotonic() - begin
            progress = min(1.0, max(step / steps, seconds / (60 * recipe.minutes)))
            if step % evaluate_every == 0 or progress == 1.0:
                point = {
                    "step": step,
                    "train": round(torch.stack(recent).mean().item(), 4),
                    "held_out": round(held_out_loss(model, held_out, recipe), 4),
                    "seconds": round(time.monotonic() - begin, 1),
                }
                curve.append(point)
                recent.clear()
                print(json.dumps(point), flush=True)
                bar.set_postfix(point)
                if point["held_out"] < best:
                    best = point["held_out"]
                    save(model, [*earlier, describe(recipe, device, documents, curve)], folder)
            bar.update(progress - bar.n)


def describe(
    recipe: Recipe, device: torch.device, documents: list[Tokens], curve: list[dict[str, float]]
) -> dict[str, object]:
    """What the model card reports of a stage."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "training_files": len(documents),
        "training_tokens": sum(map(len, documents)),
        "curve": curve,
    }


def export(checkpoint: Path, model_dir: Path) -> None:
    """Put a checkpoint's weights, in one file, beside the tokenizer that `prepare` wrote."""
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(model_dir)
    (model_dir / "training.json").write_text((checkpoint / "training.json").read_text())
    AutoTokenizer.from_pretrained(model_dir)  # fails here rather than at a user's


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.bundled.train", description=__doc__)
    parser.add_argument("command", choices=["prepare", "train", "export", "evaluate"])
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="token arrays, written by prepare")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder written by train, read by export")
    parser.add_argument("--start", type=Path, help="checkpoint that train starts from; without it, from scratch")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="the bundled model's folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in dataclasses.fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    device = torch.device(options["device"])
    match options["command"]:
        case "prepare":
            prepare(options["model"], options["corpus"])
        case "train":
            recipe = Recipe(**{field.name: options[field.name] for field in dataclasses.fields(Recipe)})
            train(recipe, options["corpus"], options["start"], options["checkpoint"], device)
        case "export":
            export(options["checkpoint"], options["model"])
        case "evaluate":
            report = evaluate(options["model"], options["corpus"], device)
            (options["model"] / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
            print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
