from __future__ import annotations

import numpy as np
import pytest

from prunus.adapters.pytorch.lineage import of_kept


@pytest.mark.parametrize("units", [[1, 3], [3, 1], (3, 1), np.array([3, 1])])
def test_values_of_what_stays_are_in_the_order_of_the_units_whatever_order_names_them(units: object) -> None:
    values = {"a": np.arange(5.0), "b": np.ones(2)}
    kept = of_kept(values, {"a": units})  # type: ignore[dict-item]
    assert kept is not None
    np.testing.assert_array_equal(kept["a"], [1.0, 3.0])
    np.testing.assert_array_equal(kept["b"], values["b"])
