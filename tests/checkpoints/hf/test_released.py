"""Presets from the numbers of released models: exact parameter counts, names one to one, settings there and back."""

import math

import pytest
from released import RELEASED

from moe_zoo.checkpoints.hf import architectures, families
from moe_zoo.checkpoints.hf.families import find
from moe_zoo.checkpoints.hf.families.others import OTHERS
from moe_zoo.checkpoints.hf.family import essential
from moe_zoo.checkpoints.hf.plan import plan
from moe_zoo.core import param as P
from moe_zoo.models import make_model
from moe_zoo.models.counting import count_parameters


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_has_exactly_its_parameters(name):
    given, total, active = RELEASED[name]
    family = find(given["architectures"][0], "config.json")
    model = make_model(family.read(given))
    assert sum(math.prod(a.shape) for a in P.arrays(model).values()) == total
    if active:
        # rounded to three figures in the sheet
        assert count_parameters(model)["active"] == pytest.approx(active, rel=0.01)
    sizes, names = {}, {}
    for leaf in plan(model, family):
        for _, tensor in leaf.tensors():
            names.setdefault(tensor, []).append((leaf.path, leaf.stored.part))
            sizes[tensor] = math.prod(leaf.stored.shape(leaf.one))
    assert sum(sizes.values()) == total
    assert all(len(set(holds)) == len(holds) for holds in names.values())


@pytest.mark.parametrize("name", RELEASED)
def test_settings_survive_the_way_to_config_json_and_back(name):
    given = RELEASED[name][0]
    family = find(given["architectures"][0], "config.json")
    config = family.read(given)
    assert not family.mismatches(config)
    assert essential(family.read(family.write(config))) == essential(config)


def test_every_class_has_one_family():
    names = [name for family in families() for name in family.architectures]
    assert len(names) == len(set(names)) and len(names) > 14


def test_what_is_refused_by_name_is_not_read_and_its_nearest_is():
    assert not OTHERS.keys() & architectures().keys()
    assert {near for near in OTHERS.values() if near} <= architectures().keys() and len(OTHERS) > 40
