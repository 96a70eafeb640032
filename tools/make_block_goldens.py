#!/usr/bin/env python3
"""Make tests/golden/blocks with the `gguf` package as the oracle.

For each quantised type NAME.bin: the blocks, then their values as F32. The blocks are random bytes under random F16
scales (small, subnormal, negative, zero, the largest) or under every scale of one byte, so that every bit of the layout
has a say in some value.

usage: tools/make_block_goldens.py [--out tests/golden/blocks]     needs numpy, gguf
"""
import argparse
from pathlib import Path

import gguf
import numpy as np

HALVES = {  # offsets of the F16 d, then dmin or m
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [], "NVFP4": [],
}
ELEMENTS = 2048  # a file
EVERY_BYTE = {"MXFP4": 1, "NVFP4": 4}  # scales of one byte at the start of a block: a file has all 256


def blocks(name: str, rng: np.random.Generator) -> np.ndarray:
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    count = 256 // EVERY_BYTE[name] if name in EVERY_BYTE else ELEMENTS // elements
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    if name in EVERY_BYTE:
        scales = EVERY_BYTE[name]
        raw[:, :scales] = np.arange(256, dtype=np.uint8).reshape(count, scales)
    for offset in HALVES[name]:
        d = rng.standard_normal(count) * 10.0 ** rng.uniform(-7, 1, count)
        d[0] = 0.0
        d[1] = -(2.0**-24)  # subnormal, as are others
        d[2] = 65504.0
        raw[:, offset : offset + 2] = d.astype(np.float16).view(np.uint8).reshape(count, 2)
    return raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests/golden/blocks")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(HALVES):
        raw = blocks(name, np.random.default_rng(i))
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).astype("<f4")
        assert not np.isnan(values).any()
        (out / f"{name}.bin").write_bytes(raw.tobytes() + values.tobytes())
        print(f"{name}: {len(raw)} blocks")


if __name__ == "__main__":
    main()
