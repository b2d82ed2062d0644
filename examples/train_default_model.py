"""Train the ReGLU language model that the package ships, on the Python standard library and worked arithmetic.

    python examples/train_default_model.py --work-dir /tmp/default_model --steps 2300 --output jsparse/default_model

Writes a Hugging Face Llama checkpoint (`hidden_act: relu`) with its calibration text and held-out data. Run again
after an interruption it continues from the last checkpoint; with fewer steps it enters the learning-rate decay
earlier. Needs the `train` extra.
"""

import argparse
import dataclasses
import json
import random
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from arithmetic import make_problem, make_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import jsparse.text.tokenizer
from convert import to_huggingface
from jsparse.executors.xla import Xla
from jsparse.model.config import ModelConfig
from jsparse.model.decoder import Decoder
from jsparse.model.layers import apply
from jsparse.model.parameters import random_weights
from jsparse.model.weights import Params, Weights

CONFIG = ModelConfig(
    hidden_size=256,
    intermediate_size=1024,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    vocab_size=2048,
    context_length=512,
    tie_embeddings=True,
    bos_token_id=0,
    eos_token_ids=(1,),
    name="default",
)
BATCH_ROWS = 8
ARITHMETIC_ROWS, LATE_ARITHMETIC_ROWS, LATE_STEP = 1, 3, 1500
TRAIN_PROBLEMS = 200_000
SPARSITY_TARGET = 0.92
MUON_LEARNING_RATE, ADAM_LEARNING_RATE = 0.02, 3e-3
WARMUP_STEPS, DECAY_SHARE = 100, 0.4


def collect_files(seed: int = 0) -> tuple[list[Path], list[Path], list[Path]]:
    """Training, calibration and held-out files of the standard library, disjoint.

    Character tables (`encodings`) are left out; calibration and held-out files are library modules, not tests.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not {"site-packages", "encodings"} & set(p.parts))
    tests = {"test", "tests", "idle_test", "idlelib", "lib2to3"}
    library = [p for p in files if not tests & set(p.relative_to(root).parts)]
    random.Random(seed).shuffle(library)
    held_out, calibration = library[: len(library) // 20], library[len(library) // 20 :][:12]
    excluded = {*held_out, *calibration}
    return [p for p in files if p not in excluded], calibration, held_out


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE in which every digit is a token of its own; encoding prepends <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=CONFIG.vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>"],
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents in one stream, each between <s> and </s>."""
    return np.concatenate([np.array([*encoding.ids, 1], np.int32) for encoding in tokenizer.encode_batch(texts)])


def sample_batch(code: np.ndarray, arithmetic: np.ndarray, starts: np.ndarray, step: int) -> np.ndarray:
    """Rows of context_length + 1 tokens, each beginning with <s>; determined by the step alone."""
    rng = np.random.default_rng(step)
    length = CONFIG.context_length
    num_arithmetic = ARITHMETIC_ROWS if step < LATE_STEP else LATE_ARITHMETIC_ROWS
    rows = [code[i : i + length] for i in rng.integers(0, len(code) - length, BATCH_ROWS - num_arithmetic)]
    usable = starts[starts < len(arithmetic) - length]
    rows += [arithmetic[i : i + length] for i in rng.choice(usable, num_arithmetic)]
    return np.stack([np.concatenate([[0], row]) for row in rows])


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """Muon for the layers' matrices, Adam for embeddings and norms; warm-up, constant, linear decay to zero."""

    def schedule(peak):
        decay = round(DECAY_SHARE * steps)
        return optax.join_schedules(
            [
                optax.linear_schedule(0, peak, WARMUP_STEPS),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0, decay),
            ],
            [WARMUP_STEPS, steps - decay],
        )

    def dimensions(params):
        def of(path, leaf):
            if leaf.ndim != 2 or "embed" in jax.tree_util.keystr(path):
                return None
            contracted = 0 if "down_t" in jax.tree_util.keystr(path) else 1
            return optax.contrib.MuonDimensionNumbers(contracted, 1 - contracted)

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule(MUON_LEARNING_RATE),
            adam_learning_rate=schedule(ADAM_LEARNING_RATE),
            weight_decay=0.01,
            muon_weight_dimension_numbers=dimensions,
        ),
    )


def training_ffn(layer, x, ffn):
    """The dense ReGLU FFN, with the mean activation (penalised) and the share of zeros (steered)."""
    gate = jax.nn.relu(x @ ffn.gate.T)
    return (gate * (x @ ffn.up.T)) @ ffn.down_t, (jnp.mean(gate), jnp.mean(gate == 0))


def loss_fn(weights, rows, penalty):
    positions = jnp.arange(rows.shape[1] - 1)[None]
    logits, _, extras = apply(Decoder(CONFIG, Xla()), weights, rows[:, :-1], positions, training_ffn)
    activations, sparsity = (jnp.stack(values) for values in zip(*extras))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()
    return cross_entropy + penalty * jnp.mean(activations), (cross_entropy, sparsity)


def make_step(optimizer, steps: int):
    @jax.jit
    def train_step(state, rows, step):
        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        penalty = jnp.exp(state["log_penalty"])
        (_, (loss, sparsity)), gradients = gradient_fn(state["weights"], rows, penalty)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["weights"])
        # The penalty's weight is steered so that sparsity follows a ramp up to the target.
        target = 0.5 + (SPARSITY_TARGET - 0.5) * jnp.minimum(1.0, step / (0.4 * steps))
        return {
            "weights": optax.apply_updates(state["weights"], updates),
            "optimizer": optimizer_state,
            "log_penalty": state["log_penalty"] + 0.05 * (target - jnp.mean(sparsity)),
        }, (loss, sparsity)

    return train_step


def initial_state(optimizer):
    weights = random_weights(CONFIG, jax.random.key(0))
    return {"weights": weights, "optimizer": optimizer.init(weights), "log_penalty": jnp.log(jnp.float32(0.01))}


def train(work_dir: Path, steps: int) -> tuple[Weights, Tokenizer]:
    """Train, or continue, up to `steps` and return the weights and the tokenizer."""
    train_files, _, _ = collect_files()
    texts = [read(path) for path in train_files]
    tokenizer_file = work_dir / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(texts).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    code = encode_documents(tokenizer, texts)
    problems = [
        encoding.ids[1:] for encoding in tokenizer.encode_batch([make_text(1, s) for s in range(TRAIN_PROBLEMS)])
    ]
    starts = np.cumsum([0, *map(len, problems[:-1])])
    arithmetic = np.concatenate([np.array(ids, np.int32) for ids in problems])
    print(f"{len(code):,} tokens of code, {len(arithmetic):,} of arithmetic", flush=True)

    optimizer = make_optimizer(steps)
    state, first = initial_state(optimizer), 0
    train_step = make_step(optimizer, steps)
    with ocp.CheckpointManager(work_dir / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as saved:
        if saved.latest_step() is not None:
            first = saved.latest_step()
            state = saved.restore(first, args=ocp.args.StandardRestore(state))
            print(f"continuing from step {first}", flush=True)
        begun = time.time()
        for step in range(first, steps):
            rows = sample_batch(code, arithmetic, starts, step)
            state, (loss, sparsity) = train_step(state, rows, step)
            if step % 50 == 0 or step == steps - 1:
                print(
                    f"step {step} loss {loss:.3f} sparsity {np.round(sparsity, 3)} penalty "
                    f"{np.exp(state['log_penalty']):.3f} {time.time() - begun:.0f} s",
                    flush=True,
                )
            if (step + 1) % 250 == 0 or step == steps - 1:
                saved.save(step + 1, args=ocp.args.StandardSave(state))
    return state["weights"], tokenizer


def export(weights: Weights, tokenizer: Tokenizer, output: Path) -> None:
    """Write the checkpoint, calibration text and held-out data."""
    _, calibration_files, held_out_files = collect_files()
    backend = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    to_huggingface(Params(CONFIG, weights, None, jsparse.text.tokenizer.Tokenizer(backend)), output)

    def excerpts(paths, tokens_per_file):
        return [cut(tokenizer, read(path), tokens_per_file) for path in paths]

    calibration = "".join(excerpts(calibration_files, 1_300)) + make_text(120, seed=1_000_000)
    (output / "calibration.txt").write_text(calibration, encoding="utf-8")
    write_lines(output / "held_out_code.jsonl", [{"text": text} for text in excerpts(held_out_files, 2_000)])
    trained_on = {make_problem(random.Random(seed)).prompt for seed in range(TRAIN_PROBLEMS)}
    rng, problems = random.Random(2_000_000), []
    while len(problems) < 600:
        problem = make_problem(rng)
        if problem.prompt not in trained_on:
            problems.append(dataclasses.asdict(problem))
    write_lines(output / "held_out_arithmetic.jsonl", problems)


def cut(tokenizer: Tokenizer, text: str, num_tokens: int) -> str:
    """The first tokens of a text, at most, up to the end of a line."""
    offsets = tokenizer.encode(text).offsets[: num_tokens + 1]
    return text[: text.rfind("\n", 0, offsets[-1][1]) + 1]


def write_lines(path: Path, entries: list[dict]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints and tokenizer of this run")
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to write; must not exist")
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"--output {args.output} exists; remove it first")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    weights, tokenizer = train(args.work_dir.absolute(), args.steps)
    export(weights, tokenizer, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
