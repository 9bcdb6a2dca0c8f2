"""What every test has: the ``world`` fixture, and property tests without a clock."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("trivium", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("trivium")
