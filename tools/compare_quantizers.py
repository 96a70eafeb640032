#!/usr/bin/env python3
"""Compare the quantiser with ggml's: relative RMSE and speed of every type, with and without importance.

Both pack the same values; the `gguf` package unpacks both. Data: Gaussian, Laplace, and the matrices of GGUFs given
with --weights. Importance: one value for each column, chi-squared with one degree of freedom; the error is weighed
with it.

usage: tools/compare_quantizers.py build/release/bench_pack LIBGGML_BASE.so [--weights MODEL.gguf] [--types Q4_0,..]
needs numpy, gguf; ggml's library is that of a llama.cpp build or of the llama-cpp-python package
"""
import argparse
import ctypes
import subprocess
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

TYPES = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4 NVFP4".split()
COLUMNS = 512


class Ggml:
    def __init__(self, library: Path):
        self.quantize_chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self.quantize_chunk.restype = ctypes.c_size_t
        floats = ctypes.POINTER(ctypes.c_float)
        self.quantize_chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, *[ctypes.c_int64] * 3, floats]

    def pack(self, name: str, values: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, float]:
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        packed = np.empty((len(values), COLUMNS // elements * size), np.uint8)
        pointer = ctypes.POINTER(ctypes.c_float)
        weights = importance.ctypes.data_as(pointer) if importance is not None else None
        start = time.process_time()
        self.quantize_chunk(
            kind, values.ctypes.data_as(pointer), packed.ctypes.data, 0, len(values), COLUMNS, weights
        )
        return packed, time.process_time() - start


class Ours:
    def __init__(self, program: Path, folder: Path):
        self.program, self.folder = program, folder

    def pack(self, name: str, values: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, float]:
        source, packed = self.folder / "values", self.folder / "packed"
        values.tofile(source)
        command = [self.program, name, source, str(COLUMNS), packed]
        if importance is not None:
            importance.tofile(self.folder / "importance")
            command.append(self.folder / "importance")
        seconds = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return np.fromfile(packed, np.uint8).reshape(len(values), -1), seconds


def relative_rmse(name: str, packed: np.ndarray, values: np.ndarray, importance: np.ndarray | None) -> float:
    found = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name]).astype(np.float64)
    weight = 1 if importance is None else importance.astype(np.float64)
    return float(np.sqrt((weight * (found - values) ** 2).sum() / (weight * values.astype(np.float64) ** 2).sum()))


def matrices(path: Path, limit: int) -> np.ndarray:
    rows = []
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) < 2 or tensor.shape[0] % 256 or tensor.name.startswith("token_embd"):
            continue
        flat = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(-1)
        rows.append(flat[: len(flat) // COLUMNS * COLUMNS].reshape(-1, COLUMNS))
    every = np.concatenate(rows)
    return np.ascontiguousarray(every[:: max(1, len(every) * COLUMNS // limit)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench_pack", type=Path)
    parser.add_argument("library", type=Path)
    parser.add_argument("--weights", type=Path, nargs="*", default=[], metavar="MODEL.gguf")
    parser.add_argument("--types", type=lambda text: text.split(","), default=TYPES)
    parser.add_argument("--elements", type=int, default=1 << 20, help="of each kind of data")
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    shape = (args.elements // COLUMNS, COLUMNS)
    data = {
        "gaussian": (0.02 * rng.standard_normal(shape)).astype(np.float32),
        "laplace": rng.laplace(0, 0.02, shape).astype(np.float32),
        **{path.stem[:12]: matrices(path, args.elements) for path in args.weights},
    }
    importance = (rng.chisquare(1, COLUMNS) + 0.01).astype(np.float32)
    worse = []
    with tempfile.TemporaryDirectory() as folder:
        peers = [Ours(args.bench_pack, Path(folder)), Ggml(args.library)]
        print(f"{'relative RMSE':20}      plain                         weighted                     MB/s of floats")
        print(f"{'type':8}{'data':12}" + f"{'ours':>9}{'ggml':>9}{'ratio':>9}" * 2 + f"{'ours':>9}{'ggml':>9}")
        for name in args.types:
            for label, values in data.items():
                line, speeds = "", []
                for weight in (None, importance):
                    packed = [peer.pack(name, values, weight) for peer in peers]
                    ours, ggml = (relative_rmse(name, p, values, weight) for p, _ in packed)
                    line += f"{ours:9.5f}{ggml:9.5f}{ours / ggml:9.4f}"
                    speeds = speeds or [values.nbytes / 1e6 / max(seconds, 1e-6) for _, seconds in packed]
                    if ours > ggml:
                        worse.append(f"{name} on {label}{' (weighted)' if weight is not None else ''}")
                print(f"{name:8}{label:12}{line}" + "".join(f"{s:9.0f}" for s in speeds), flush=True)
    print("higher error than ggml: " + (", ".join(worse) or "none"))


if __name__ == "__main__":
    main()
