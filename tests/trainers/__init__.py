"""L2-SP in other trainers than `transformers.Trainer`: each must keep the same promises."""

import pytest

# Plain asserts there would not show what they compared.
pytest.register_assert_rewrite("tests.trainers.contract")
