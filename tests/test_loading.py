"""What loading a frozen model takes of the memory of its host."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # after the root, for lora
import loading


def test_loading_takes_no_memory_of_a_ranks_own():
    """What ranks add to a host is the file, mapped once; what is on another device is never built on it.

    With eight ranks, 1.3 times the file at most. 88 MB of ViT, 92 MB of CLIP; a rank's noise is about 1 MB,
    now and then 3 in one of the loads.
    """
    found = loading.ratios("vit_small_patch14_dinov2.lvd142m", layers=1, width=384)
    for name in ("a file, cpu, fp32", "pretrained, cpu, fp32"):
        assert 0.95 < found[name]["shared"] < 1.05, name
    assert 0.45 < found.pop("a file, cpu, bf16")["private"] < 0.55  # the model itself: so private is seen
    for name, r in found.items():
        assert r["private"] < 0.3 / 8 and r["most"] < 0.1, (name, r)
