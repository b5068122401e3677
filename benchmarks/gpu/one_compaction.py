"""Child of verify.py: one small compaction, for a memory checker to watch; wrong moves fail it."""

import argparse
import json
import sys
from pathlib import Path

import torch

import rkv_vllm


def main() -> None:
    """Compact two requests of odd sizes once and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from kernel_cases import Shape, new_workload
    from kernel_versions import check, naive, ours

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape(
        num_tokens=391, budget=257, head_size=128, num_layers=2, num_requests=2, num_heads=2
    )
    work = new_workload(shape, "clustered", torch.bfloat16, device)
    found = check(work, {"ours": ours(work), "naive": naive(work)})
    if device.type == "cuda":
        torch.cuda.synchronize()
    failures = [f"{name}: {verdict}" for name, verdict in found.items() if verdict[:2] != "ok"]
    result = {"device": str(device), "failures": failures, "package": rkv_vllm.__file__}
    args.result.write_text(json.dumps(result))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
