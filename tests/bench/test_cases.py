import pytest

from convnext_kernels.bench.cases import FULL, KERNELS, MODES, QUICK, RIVALS, SHAPES, STAGES, STANDARD, cases, select


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_are_unique(device):
    names = [case.name for case in cases(device)]
    assert len(set(names)) == len(names) > 300
    assert all(name.count("/") == 1 and " " not in name for name in names)


def test_the_table_holds_what_it_should():
    names = {case.name for case in select(STANDARD)}
    for dtype in ("fp32", "bf16"):
        for n in (1, 8):
            for c, size in STAGES:
                at = f"C{c}-{size}x{size}-b{n}-{dtype}-forward"
                assert {f"dwconv/K{k}-{at}" for k in KERNELS} <= names
                others = {f"dwconv/K{f'{h}x{w}' if h != w else f'{h}s{s}'}-{at}" for h, w, s in SHAPES}
                assert others <= names if c in (96, 384) else not others & names
                assert f"layernorm/{at}" in names
                assert {f"{group}/{v}-{at}" for group in ("mlp", "block") for v in ("V1", "V2")} <= names
        for c, size in STAGES:
            at = f"C{c}-{size}x{size}-b8-{dtype}-training"
            assert {f"dwconv/K7-{at}", f"layernorm/{at}", f"mlp/V1-{at}", f"block/V1-{at}", f"block/V2-{at}"} <= names
        for label in ("T", "S", "B", "V2-T"):
            assert {f"model/ConvNeXt-{label}-{size}-b1-{dtype}-forward" for size in (224, 384)} <= names
        assert f"model/ConvNeXt-T-224-b2-{dtype}-training" in names
        assert {f"rival/{label.replace('/', '')}-224-b1-{dtype}-forward" for label in RIVALS} <= names


def test_modes_are_nested_and_a_gpu_has_more_dtypes():
    quick, standard, full = ({c.name for c in select(mode)} for mode in MODES)
    assert quick < standard < full
    assert full == {c.name for c in cases()}
    assert {c.dtype for c in cases("cuda")} == {"fp32", "bf16", "fp16", "tf32"}
    assert {c.group for c in select(QUICK)} == {"layernorm", "dwconv", "mlp", "block", "model"}


def test_patterns():
    assert {c.group for c in select(STANDARD, ("layernorm",))} == {"layernorm"}
    assert {c.name for c in select(QUICK, ("dwconv/K7*fp32*",))} == {"dwconv/K7-C384-14x14-b1-fp32-forward"}
    assert {c.name for c in select(QUICK, ("dwconv/k7-c384-14x14-b1",))} == {
        f"dwconv/K7-C384-14x14-b1-{dtype}-forward" for dtype in ("fp32", "bf16")
    }
    several = select(QUICK, ("layernorm", "block"))
    assert {c.group for c in several} == {"layernorm", "block"}


def test_a_pattern_of_larger_cases_alone_selects_them():
    assert {c.mode for c in select(QUICK, ("K31-C96",))} == {STANDARD, FULL}


def test_a_pattern_that_matches_nothing_names_groups_and_a_case():
    with pytest.raises(ValueError, match=r"'conv9'.*groups: layernorm, dwconv.*layernorm/C96"):
        select(STANDARD, ("block", "conv9"))
