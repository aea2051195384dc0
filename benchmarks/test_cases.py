"""Every case of `convnext_kernels.bench.cases` with every candidate of `convnext_kernels.bench.candidates`."""


def test_case(report, case, candidate):
    report(case, candidate)
