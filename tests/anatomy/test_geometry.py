"""Heads, groups and columns, counted by hand."""

import pytest
import torch

from microglia.anatomy import HeadGeometry

GEOMETRY = HeadGeometry(heads=6, kv_heads=3, head_dim=4)


def test_numbers_of_a_grouped_site():
    assert (GEOMETRY.queries_per_group, GEOMETRY.width, GEOMETRY.kv_width) == (2, 24, 12)
    assert GEOMETRY.kept(4, 2) == HeadGeometry(4, 2, 4)


def test_split_and_group_keep_the_order_of_heads():
    x = torch.arange(24).expand(2, 5, 24)
    assert GEOMETRY.split(x).shape == (2, 5, 6, 4)
    assert GEOMETRY.split(x)[0, 0, 2].tolist() == [8, 9, 10, 11]
    assert GEOMETRY.by_group(torch.arange(6)).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert GEOMETRY.group_of(torch.tensor([0, 1, 2, 5])).tolist() == [0, 0, 1, 2]


def test_columns_are_those_of_the_given_heads():
    assert GEOMETRY.columns(torch.tensor([2, 0])).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 4, 8), (0, 1, 8), (6, 0, 8), (6, 3, 0), (2, 4, 8)])
def test_impossible_geometries_are_refused(heads, kv_heads, head_dim):
    with pytest.raises(
        ValueError, match=f"{heads} heads in {kv_heads} groups of head size {head_dim} make no geometry"
    ):
        HeadGeometry(heads, kv_heads, head_dim)


def test_row_shape_gathers_what_rows_keep_and_nothing_twice():
    keep = torch.tensor([[1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    shape = HeadGeometry(6, 3, 4).row_shape(keep)
    assert shape.groups.tolist() == [[0, 2], [1, 0], [2, 0]]
    assert shape.heads.tolist() == [[0, 1, 4, 5], [2, 3, 0, 1], [5, 4, 0, 1]]
    assert shape.kept.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
