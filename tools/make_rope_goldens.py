#!/usr/bin/env python3
"""Make tests/golden/rope/angles.json: the frequencies of rotary embedding, with YaRN by transformers' own function, and
cos and sin of positions up to a million, all in fp64.

transformers computes in float32, where an angle of a million radians is off by 0.03. Here its function is given numpy's
fp64 for torch.

usage: tools/make_rope_goldens.py [--out tests/golden/rope]     needs numpy, transformers (not torch)
"""
import argparse
import json
import types
from pathlib import Path

import numpy as np
import transformers
from transformers import modeling_rope_utils as rope_utils


class Fp64(np.ndarray):
    """An array that takes torch's conversions and stays in fp64."""

    def to(self, **_):
        return self


def arange(*args, **_):
    return np.arange(*args, dtype=np.float64).view(Fp64)


rope_utils.torch = types.SimpleNamespace(arange=arange, clamp=np.clip, float=None, float32=None)

POSITIONS = [0, 1, 17, 4095, 65537, 262143, 262144, 524287, 999999, 1009999]
TINY = {"rope_theta": 100000.0, "head_dim": 64, "rotary_dim": 16, "trained": 4096}
LARGE = {"rope_theta": 10000000.0, "head_dim": 256, "rotary_dim": 64, "trained": 262144}
CASES = [
    LARGE, LARGE | {"factor": 2.0}, LARGE | {"factor": 4.0},
    LARGE | {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25},
    TINY, TINY | {"factor": 2.0}, TINY | {"factor": 4.0}, TINY | {"factor": 244.2},
    {"rope_theta": 10000.0, "head_dim": 12, "rotary_dim": 6, "trained": 7, "factor": 3.0},  # low == high
]


def golden(case):
    if "factor" not in case:
        dim = case["rotary_dim"]
        frequency, scale = case["rope_theta"] ** (-np.arange(0, dim, 2) / dim), 1.0
    else:
        parameters = {"rope_type": "yarn", "rope_theta": case["rope_theta"], "factor": case["factor"],
                      "partial_rotary_factor": case["rotary_dim"] / case["head_dim"],
                      "original_max_position_embeddings": case["trained"]}
        parameters |= {k: case[k] for k in ("beta_fast", "beta_slow", "attention_factor") if k in case}
        config = types.SimpleNamespace(rope_parameters=parameters, head_dim=case["head_dim"], hidden_size=0,
                                       num_attention_heads=1, standardize_rope_params=lambda: None,
                                       max_position_embeddings=int(case["trained"] * case["factor"]))
        frequency, scale = rope_utils._compute_yarn_parameters(config)
    frequency = np.asarray(frequency, dtype=np.float64)
    angles = np.outer(POSITIONS, frequency)
    return case | {"frequency": frequency.tolist(), "scale": float(scale),
                   "cos": np.cos(angles).tolist(), "sin": np.sin(angles).tolist()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests/golden/rope")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cases = ",\n".join(json.dumps(golden(case)) for case in CASES)
    (args.out / "angles.json").write_text(
        f'{{"made_by": "tools/make_rope_goldens.py, transformers {transformers.__version__}, numpy {np.__version__}",\n'
        f'"positions": {json.dumps(POSITIONS)},\n"cases": [\n{cases}\n]}}\n')


if __name__ == "__main__":
    main()
