"""Compiled kernels give eager's bytes where a compiler would round otherwise, or are not used."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor import config

from qatlora.errors import ConfigError
from qatlora.grid import Dither, Q4Blocks, add_dither_, decode, fused
from qatlora.grid.fused import VARIABLE

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile everywhere, and let no kernel fall back to eager unnoticed."""
    monkeypatch.setenv(VARIABLE, "always")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*computed by single operators")
        yield


def in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "never")


def all_fp16(device: str) -> Tensor:
    """Every finite fp16, subnormal ones and both zeros among them, [1984, 32]."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.float16)
    return values[values.isfinite()].view(-1, 32).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_step_times_every_level_is_decoded_alike(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = all_fp16(device)
    levels = torch.arange(-8, 8, dtype=torch.int8, device=device).repeat(len(steps), 64)
    found = decode(Q4Blocks(steps, levels), dtype)
    in_eager(monkeypatch)
    expected = decode(Q4Blocks(steps, levels), dtype)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert expected.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_the_dither_of_tiles_of_several_shapes_is_alike(device: str) -> None:
    @fused()
    def fill_dithered(out: Tensor, levels: Tensor, by_row: Tensor, by_column: Tensor) -> None:
        out.copy_(add_dither_(levels.float(), by_row, by_column))

    for name, first, num_rows, width in (("a", 0, 3, 96), ("b", 2**28 + 5, 40, 608)):
        rows = slice(first, first + num_rows)
        ramps = Dither(7, name).ramps(rows, width, torch.device(device))
        levels = torch.randint(-8, 8, (num_rows, width), device=device)
        found = torch.empty(num_rows, width, device=device)
        fill_dithered(found, levels, *ramps)
        assert torch.equal(found, add_dither_(levels.float(), *ramps))


@pytest.mark.parametrize("device", DEVICES)
def test_every_rounding_is_kept_where_a_compiler_would_save_it(device: str) -> None:
    @fused()
    def fill_all(out: Tensor, a: Tensor, b: Tensor) -> None:
        out[0] = a * b + 1.0
        out[1] = (a * b).half().float() - a * b
        out[2] = a / b
        out[3] = a * 2.0**-126 * 0.5

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4096, generator=generator).to(device)
    found, expected = torch.empty(2, 4, 4096, device=device)
    fill_all(found, a, b)
    fill_all.__wrapped__(expected, a, b)
    assert torch.equal(found, expected)
    product = a.double() * b.double()
    assert (expected[0] != (product + 1.0).float()).any()  # one rounding instead of two
    assert expected[1].any()  # no rounding to fp16
    assert (expected[3] != 0).any()  # subnormals flushed to zero


def run_with_warnings(kernel: object, times: int) -> tuple[Tensor, list[str]]:
    out = torch.empty(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            kernel(out, torch.ones(3))
    return out, [str(entry.message) for entry in caught if "single operators" in str(entry.message)]


def test_a_kernel_that_differs_from_eager_is_not_used_and_one_warning_says_so() -> None:
    @fused()
    def fill_otherwise(out: Tensor, x: Tensor) -> None:
        out.copy_(x + 1 if torch.compiler.is_compiling() else x + 2)

    out, messages = run_with_warnings(fill_otherwise, times=3)
    assert (out == 3).all()
    (message,) = messages
    assert "fill_otherwise" in message
    assert "differs from eager" in message
    assert f"{VARIABLE}=never" in message


def test_without_a_compiler_eager_runs_and_one_warning_says_so() -> None:
    @fused()
    def fill_sum(out: Tensor, x: Tensor) -> None:
        out.copy_(x * 12345.0 + 6)

    @fused()
    def fill_difference(out: Tensor, x: Tensor) -> None:
        out.copy_(x * 12345.0 - 6)

    with config.patch({"force_disable_caches": True, "cpp.cxx": (None, "no-such-compiler")}):
        out, messages = run_with_warnings(fill_sum, times=3)
        assert (out == 12351).all()
        out, more = run_with_warnings(fill_difference, times=3)
        assert (out == 12339).all()
    assert not more
    (message,) = messages
    assert "a kernel cannot be compiled for cpu" in message
    assert "no-such-compiler" in message


def test_a_kernel_is_tried_where_roundings_show_and_leaves_the_generator_alone() -> None:
    tried: list[float] = []

    def some_values(x: Tensor) -> tuple[Tensor]:
        tried.append(float(torch.randn(())))
        return (torch.full_like(x, 5.0),)

    @fused(trial=some_values)
    def fill_product(out: Tensor, x: Tensor) -> None:
        out.copy_(x * 3)

    state = torch.random.get_rng_state()
    run_with_warnings(fill_product, times=2)
    assert len(tried) == 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_auto_compiles_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from qatlora.grid.fused import compiles_on

    monkeypatch.delenv(VARIABLE)
    assert compiles_on(torch.device("cuda"))
    assert not compiles_on(torch.device("cpu"))


def test_an_unknown_choice_is_refused_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ConfigError, match="QATLORA_COMPILE is 'yes', but it must be auto"):
        decode(Q4Blocks(torch.zeros(1, 1).half(), torch.zeros(1, 32, dtype=torch.int8)))
