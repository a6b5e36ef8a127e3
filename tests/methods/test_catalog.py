"""The law of a method, and the rows of the table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsa_secure.errors import ConfigError
from fedsa_secure.methods import METHODS, Method, find_method
from fedsa_secure.types import Role

A, B, HEAD = Role.A, Role.B, Role.HEAD
HEADS = ("local", "frozen", "shared")

roles = st.frozensets(st.sampled_from(Role))


def make(trained: frozenset[Role], shared: frozenset[Role]) -> Method:
    return Method(name="own", trained=trained, shared=shared, summary="", source="")


@given(trained=roles, shared=roles)
def test_method_is_made_exactly_if_it_trains_something_and_all_that_it_shares(trained, shared):
    if trained and shared <= trained:
        method = make(trained, shared)
        assert method.personal | method.shared == trained
        assert not method.personal & method.shared
    else:
        with pytest.raises(ConfigError) as refused:
            make(trained, shared)
        assert refused.value.option == "method"


def test_error_names_what_would_be_shared_untrained():
    with pytest.raises(ConfigError, match="own would share A, head without training it"):
        make(frozenset({B}), frozenset({A, B, HEAD}))


@pytest.mark.parametrize(
    ("name", "trained", "shared"),
    [
        ("fedsa", {A, B, HEAD}, {A}),
        ("fedavg", {A, B, HEAD}, {A, B}),
        ("local", {A, B, HEAD}, set()),
        ("random-a", {B, HEAD}, set()),
        ("head-only", {HEAD}, set()),
    ],
)
def test_row_of_the_table(name, trained, shared):
    method = find_method(name)
    assert (method.name, method.trained, method.shared) == (name, trained, shared)


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_found_by_its_name_and_described(name):
    method = find_method(name)
    assert method is METHODS[name]
    assert method.name == name
    assert method.summary
    assert method.source


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", METHODS)
def test_head_option_moves_the_head_and_nothing_else(name, head):
    before = METHODS[name]
    only_head = before.trained == {HEAD}
    if (head == "shared" and not before.shared) or (head == "frozen" and only_head):
        with pytest.raises(ConfigError):
            find_method(name, head)
        return
    after = find_method(name, head)
    assert after.trained - {HEAD} == before.trained - {HEAD}
    assert after.shared - {HEAD} == before.shared - {HEAD}
    assert (HEAD in after.trained) == (head != "frozen")
    assert (HEAD in after.shared) == (head == "shared")
    assert METHODS[name] is before


def test_method_that_shares_nothing_cannot_share_its_head():
    with pytest.raises(ConfigError, match="'local' shares nothing") as refused:
        find_method("local", "shared")
    assert refused.value.option == "head"


def test_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(
        ConfigError, match=r"'fedsaa'; did you mean 'fedsa'\?.*head-only"
    ) as refused:
        find_method("fedsaa")
    assert refused.value.option == "method"


def test_methods_cannot_be_changed():
    with pytest.raises(AttributeError):
        METHODS["fedsa"].shared = frozenset(Role)


def test_shared_head_can_still_be_frozen():
    assert METHODS["fedsa"].with_head("shared").with_head("frozen") == find_method(
        "fedsa", "frozen"
    )
