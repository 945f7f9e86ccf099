import pytest

from branchmerge.errors import UserError
from branchmerge.merge.tree import Tree, parse


def test_leaves_stand_from_left_to_right() -> None:
    assert parse(["code", ["science", "math"]]).leaves == ["code", "science", "math"]


def test_fold_fuses_inner_nodes_first_and_keeps_left_and_right() -> None:
    steps: list[str] = []

    def fuse(models: object) -> str:
        assert isinstance(models, list)
        steps.append("&".join(models))
        return f"({'&'.join(models)})"

    assert parse(["code", ["science", "math"]]).fold(str, fuse) == "(code&(science&math))"
    assert steps == ["science&math", "code&(science&math)"]


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        (["math", "code"], "math+code"),
        (["code", ["science", "math"]], "code++science+math"),
        ([["code", "science"], "math"], "code+science++math"),
        (["code", "science", "math"], "code+science+math"),
        (["a", ["b", ["c", "d"]]], "a+++b++c+d"),
    ],
)
def test_names_tell_trees_apart(tree: list[object], name: str) -> None:
    assert parse(tree).name() == name


def test_nested_is_the_inverse_of_parse() -> None:
    tree = ["a", ["b", ["c", "d"]]]
    assert parse(tree).nested() == tree


def test_flat_puts_all_leaves_into_one_node() -> None:
    assert parse(["code", ["science", "math"]]).flat() == Tree(children=(Tree("code"), Tree("science"), Tree("math")))


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ("math", "nothing to merge"),
        (["math"], "two or more"),
        ([], "two or more"),
        (["math", 3], "3 is neither"),
        (["math", ["code", "math"]], "math stands in it twice"),
        (None, "None is neither"),
    ],
)
def test_what_is_no_tree_is_refused(tree: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(tree)
