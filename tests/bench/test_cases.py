import pytest

from convnext_kernels.bench.cases import QUICK, STANDARD, cases, select


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_are_unique(device):
    names = [case.name for case in cases(device)]
    assert len(set(names)) == len(names) > 300
    assert all(name.count("/") == 1 and " " not in name for name in names)


def test_patterns():
    assert {c.group for c in select(STANDARD, ("layernorm",))} == {"layernorm"}
    assert {c.name for c in select(QUICK, ("dwconv/K7*fp32*",))} == {"dwconv/K7-C384-14x14-b1-fp32-forward"}
    assert {c.name for c in select(QUICK, ("dwconv/k7-c384-14x14-b1",))} == {
        f"dwconv/K7-C384-14x14-b1-{dtype}-forward" for dtype in ("fp32", "bf16")
    }
    several = select(QUICK, ("layernorm", "block"))
    assert {c.group for c in several} == {"layernorm", "block"}


def test_a_pattern_that_matches_nothing_names_groups_and_a_case():
    with pytest.raises(ValueError, match=r"'conv9'.*groups: layernorm, dwconv.*layernorm/C96"):
        select(STANDARD, ("block", "conv9"))
