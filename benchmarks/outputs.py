"""What the shipped model says and what calibration fits, recorded and compared: a change that must change neither.

Greedy and sampled tokens, dense and sparse, of one prompt and of five, through every executor (CUDA's interpreted,
the NPU's on PyTorch's CPU), and checksums of fitted predictors. Recordings compare on the machine that made them.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from rich.progress import track

import jsparse
from jsparse.executors.kernels import KernelExecutor
from jsparse.executors.npu import Npu
from jsparse.executors.select import make_executor
from jsparse.executors.xla import Xla
from jsparse.predictors.texts import default_texts

PROMPTS = [
    "def fib(n):",
    "class Stack:\n    def push",
    "import os\n\nfor",
    "# Reads a file and returns",
    "try:\n    value = int(text)\nexcept",
]
EXECUTORS = (
    (Xla(), 64),
    (KernelExecutor("cpu"), 64),
    (Npu(make_executor("cann").host, "cpu", whole=False), 24),
    (KernelExecutor("cuda"), 8),
)
"""With the tokens that each decodes."""
HOW = {"greedy": {}, "sampled": {"temperature": 0.9, "top_p": 0.95, "top_k": 200, "seed": 7}}


def outputs() -> dict[str, list[list[int]] | str]:
    """Token ids, and a checksum of the predictors, by what they are of."""
    params = jsparse.load("default")
    fitted = jsparse.fit_predictors(params, default_texts("default"), tokens=8000)
    prompts = [np.asarray(params.tokenizer.encode(prompt), np.int32) for prompt in PROMPTS]
    cases = [
        (executor, count, batch, sparse, how)
        for executor, count in EXECUTORS
        for batch in (1, 5)
        for sparse in (False, True)
        for how in HOW
        if (executor.name, batch, how) != ("cuda", 5, "sampled")  # which takes long
    ]
    found: dict[str, list[list[int]] | str] = {}
    for executor, count, batch, sparse, how in track(
        cases, "generating", console=None, disable=not sys.stderr.isatty()
    ):
        name = f"{executor.name} batch {batch} {'sparse' if sparse else 'dense'} {how}"
        options = {"max_new_tokens": count, "executor": executor, "sparse": sparse, **HOW[how]}
        found[name] = [tokens.tolist() for tokens in jsparse.generate(fitted, prompts[:batch], **options)]
    for bits in (16, 4):
        made = jsparse.fit_predictors(params, default_texts("default"), tokens=4000, rank=24, bits=bits)
        checksum = hashlib.sha256()
        for leaf in jax.tree.leaves([(p.a, p.b, p.bias) for p in made.predictors]):
            checksum.update(np.ascontiguousarray(leaf).tobytes())
        found[f"predictors {bits} bits"] = checksum.hexdigest()
    return found


def difference(name: str, before: list[list[int]] | str, after: list[list[int]] | str | None) -> str | None:
    """What has changed, or None."""
    if before == after:
        return None
    if isinstance(before, str) or after is None:
        return f"{name}: changed"
    tokens = [pair for rows in zip(before, after) for pair in zip(*rows)]
    return f"{name}: {sum(a != b for a, b in tokens)} of {len(tokens)} tokens changed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON to write, or to compare with where it exists")
    args = parser.parse_args()
    found = outputs()
    if not args.file.exists():
        args.file.write_text(json.dumps(found))
        print(f"recorded {len(found)} outputs in {args.file}")
        return
    recorded = json.loads(args.file.read_text())
    changed = [line for name, before in recorded.items() if (line := difference(name, before, found.get(name)))]
    print("\n".join([*changed, f"{len(recorded) - len(changed)} of {len(recorded)} outputs are the same"]))
    raise SystemExit(bool(changed))


if __name__ == "__main__":
    main()
