"""What a twin keeps of its function's source: the user's file and lines."""

import traceback

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lifting import twin_of

from fla_compile.passes.lift_loops import lift_loops


@settings(max_examples=8, deadline=None)
@given(before=st.integers(0, 4), inside=st.integers(0, 3), indent=st.integers(0, 1))
def test_traceback_lines_are_the_users(tmp_path_factory, before, inside, indent):
    lines = [*(["class C:"] * indent), "def f(x, S, bad):", *(["    y = 1"] * before), "    for t in range(3):"]
    lines += ["        z = x[t]"] * inside + ["        S = S + x[t] + bad.missing", "    return S"]
    text = "\n".join(lines[:indent] + ["    " * indent + line for line in lines[indent:]]) + "\n"
    path = tmp_path_factory.mktemp("user") / "user.py"
    path.write_text("\n" * before + text)
    namespace = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    twin = twin_of(namespace["C"].f if indent else namespace["f"])
    with pytest.raises(AttributeError) as caught:
        # Outside Dynamo the number's first step fails before any scan is made.
        twin(torch.ones(3, 2), 0, object())
    frames = [f for f in traceback.extract_tb(caught.value.__traceback__) if f.filename == str(path)]
    wrong = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if "missing" in line)
    loop = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if "for t" in line)
    assert [f.lineno for f in frames] == [loop, wrong]


def test_equal_code_in_two_files(tmp_path):
    """Code objects of two files compare equal; each twin must tell its own file, or a refused loop is never left."""
    lines = "def total(x):", "    s = x.new_zeros(3)", "    for t in range(x.shape[1]):", "        s = s + x[:, t]"
    text = "\n".join([*lines, "    return s", ""])
    for name in ("one.py", "two.py"):
        path, namespace = tmp_path / name, {}
        path.write_text(text)
        exec(compile(text, str(path), "exec"), namespace)
        lifted = lift_loops(namespace["total"])
        assert [site.filename for site in lifted.loops] == [str(path)]
        assert lifted.twin.__code__.co_filename == str(path)
