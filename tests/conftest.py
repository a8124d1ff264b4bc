"""Settings for every test: Hypothesis without deadlines (the machine may be busy), the same examples every time."""

from hypothesis import settings

settings.register_profile("retouch", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("retouch")
