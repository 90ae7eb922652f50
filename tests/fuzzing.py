"""How much a fuzz test tries: little in every run, QATLORA_FUZZ times as much by hand."""

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("QATLORA_FUZZ", "1"))


def examples(count: int) -> settings:
    """Settings of hypothesis for a test that takes files or a whole configuration per example."""
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
