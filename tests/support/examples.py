"""Settings of hypothesis that several suites use."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

#: For tests whose examples can take long on a busy machine.
ANY_TIME = settings(
    max_examples=10,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
