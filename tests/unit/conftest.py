"""How hypothesis works here: the same cases every time, nothing left in the clone, no verdict about a slow machine."""

from hypothesis import HealthCheck, settings

settings.register_profile('unit', max_examples=60, derandomize=True, database=None, deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('unit')
