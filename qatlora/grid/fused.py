"""Chains of elementwise operators, each compiled into one kernel that gives eager's very bytes.

On a GPU every operator of such a chain is a launch and a pass over memory. `fused` hands the chain
to torch.compile (Inductor writes Triton for CUDA and C++ for a CPU). What Inductor would do faster
but differently is switched off, because one changed bit can change a code:

- a round trip through fp16 is dropped, as a narrower type is of no use to a fused kernel;
- a product and a sum become one fused multiply-add, which rounds once instead of twice;
- a quotient is approximated to two units in the last place, and subnormals are flushed to zero.

Nobody has to believe that list: the first time a kernel meets a device and types, it is tried
against eager, and if it cannot be built or differs in one bit, eager is used from then on and a
warning says so. QATLORA_COMPILE chooses where kernels are compiled: auto (on CUDA), always, never.

Source: torch/_inductor/config.py, class eager_numerics and emulate_precision_casts (2.13).
"""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from qatlora.errors import ConfigError

VARIABLE = "QATLORA_COMPILE"
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "emulate_precision_casts": True,  # keeps fp16's rounding; no fused multiply-add in Triton
    "cpp.enable_floating_point_contract_flag": "off",  # nor in C++
    "eager_numerics.division_rounding": True,
    "eager_numerics.disable_ftz": True,
}
_MOST_VARIANTS = 64  # of one kernel: types, stores, modes of autograd and autocast

Fill = Callable[..., None]
Trial = Callable[..., tuple[Any, ...]]
Forward = TypeVar("Forward", bound=Callable[..., Any])


def eager_in_user_graphs(forward: Forward) -> Forward:
    """Decorate a layer's forward: a user's torch.compile breaks its graph there."""
    return torch.compiler.disable(
        forward,
        reason="qatlora computes a deployed weight by itself: traced into a larger graph, its fp16 "
        "steps would lose their rounding, and what is trained would not be what is exported",
    )


def compiles_on(device: torch.device) -> bool:
    """Whether kernels are to be compiled for a device, by QATLORA_COMPILE.

    Raises:
        ConfigError: the variable has an unknown value.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in ("auto", "always", "never"):
        raise ConfigError(
            f"{VARIABLE} is {choice!r}, but it must be auto (kernels are compiled on CUDA), always "
            "or never. Correct it, or unset it."
        )
    return choice == "always" or (choice == "auto" and device.type == "cuda")


def fused(trial: Trial | None = None) -> Callable[[Fill], Fill]:
    """Decorate a function that fills its first argument, a tensor, from the others.

    Apart from that it must have no effect, and its shapes may vary from call to call.

    Args:
        trial: takes the first call's other arguments and returns some of the same types on which
            every rounding shows; None tries the kernel on the first call's own.
    """

    def decorate(fill: Fill) -> Fill:
        kernel = _Kernel(fill, trial)

        @functools.wraps(fill)
        def call(out: Tensor, *arguments: Any) -> None:
            (kernel if compiles_on(out.device) else fill)(out, *arguments)

        return call

    return decorate


class _Kernel:
    """A compiled function, the original, and what was learned of their difference."""

    def __init__(self, fill: Fill, trial: Trial | None) -> None:
        self._fill, self._trial = fill, trial
        self._trusted: dict[tuple[Any, ...], bool] = {}

    @functools.cached_property
    def _compiled(self) -> Fill:
        return torch.compile(  # type: ignore[call-overload]  # its stubs lack recompile_limit
            self._fill, dynamic=True, options=_OPTIONS, recompile_limit=_MOST_VARIANTS
        )

    def __call__(self, out: Tensor, *arguments: Any) -> None:
        variant = tuple(
            (x.device, x.dtype) if isinstance(x, Tensor) else x for x in (out, *arguments)
        )
        if variant not in self._trusted:
            self._trusted[variant] = self._is_exact(out, arguments)
        (self._compiled if self._trusted[variant] else self._fill)(out, *arguments)

    def _is_exact(self, out: Tensor, arguments: tuple[Any, ...]) -> bool:
        """Try the kernel against eager; warn where it fails."""
        if self._trial is not None:
            with torch.random.fork_rng(() if out.device.type == "cpu" else (out.device,)):
                arguments = self._trial(*arguments)
        expected, found = torch.zeros_like(out), torch.zeros_like(out)
        self._fill(expected, *arguments)
        try:
            self._compiled(found, *arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler fails in as many ways as there are compilers
            reason = " ".join(f"{type(error).__name__}: {error}".splitlines()[:2])
            _warn(f"a kernel cannot be compiled for {out.device} ({reason})")
            return False
        if torch.equal(expected.view(torch.uint8), found.view(torch.uint8)):
            return True
        _warn(f"{self._fill.__name__}, compiled for {out.device}, differs from eager")
        return False


@functools.cache  # one warning for all kernels that a missing compiler concerns
def _warn(problem: str) -> None:
    warnings.warn(
        f"A deployed weight is computed by single operators, which is right but slower: {problem}. "
        "Install a Triton and a C++ compiler that this PyTorch supports, or do without them "
        f"({VARIABLE}=never).",
        RuntimeWarning,
        stacklevel=2,
    )
