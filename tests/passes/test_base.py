"""The one place that runs passes: what it times, records, dumps, drops and checks."""

from __future__ import annotations

import time

import pytest
import torch

from dit_opt.decisions import Decision, RewriteReason
from dit_opt.facts.graph import Facts
from dit_opt.options import OptionError, Options
from dit_opt.passes import PASSES
from dit_opt.passes.base import Match, Pass, run
from dit_opt.program.dump import Dumper
from dit_opt.program.emit import Emitter
from dit_opt.program.modes import Mode
from dit_opt.program.program import Program
from dit_opt.program.slots import Slot, SlotRead, SlotRef
from dit_opt.program.spec import SpecError
from tests.graphs import capture_one

X = torch.arange(4.0)


def model(x):
    return x.sin() + 1


class Doubling(Pass):
    """Doubles every sine, and has nothing to do with additions."""

    name = "doubling"
    keeps = frozenset({"kept"})

    def find(self, facts, options):
        matches = []
        for node in facts.graph.nodes:
            if node.target == "sin":
                matches.append(Match(Decision("m", "f.py:1", RewriteReason.REWRITTEN), node, 2))
            elif node.op == "call_function":
                reason = RewriteReason.NOT_PROVED
                matches.append(Match(Decision("m", "f.py:2", reason, "no sine"), node))
        return matches

    def rewrite(self, program, matches, options):
        for match in matches:
            double(program.main.gm.graph, match.node, match.what)

    def summarise(self, matches):
        return f"{len(matches)} places."


class Lowered(Doubling):
    """Doubles each mode by itself."""

    name = "lowered"
    rewrite = Pass.rewrite

    def lower(self, variant, matches, options):
        for match in matches:
            double(variant.graph.gm.graph, variant.at[match.node], match.what)


class Sparse(Doubling):
    name = "sparse"
    sparse_only = True


class SparseLowered(Lowered):
    name = "sparse_lowered"
    sparse_only = True


class Unwanted(Doubling):
    name = "unwanted"

    def wanted(self, options):
        return options.fuse

    def find(self, facts, options):
        raise AssertionError("asked")


def double(graph, node, factor):
    with graph.inserting_after(node):
        doubled = Emitter(graph, node).call(torch.mul, node, factor)
    node.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)


def run_on(*passes, dump=None):
    program = Program(capture_one(model, X))
    lowering = run(passes, program, Options(), Dumper(dump))
    return program, lowering.record, lowering


def compute(variant):
    return variant.graph.gm(X)[0].tolist()


def test_records_tell_what_each_pass_looked_at_and_how_long_it_took():
    class Slow(Doubling):
        name = "slow"

        def find(self, facts, options):
            time.sleep(0.05)
            return super().find(facts, options)

    _, record, _ = run_on(Slow(), Unwanted(), Doubling())
    slow, fast = record.passes
    assert (slow.name, slow.changed, slow.summary) == ("slow", 1, "2 places.")
    assert slow.seconds >= 0.05 > fast.seconds > 0
    assert [d.accepted for d in slow.decisions] == [True, False]
    assert slow.decisions[1].detail == "no sine"
    # the multiplication that was written is looked at, too
    assert len(fast.decisions) == 3


@pytest.mark.parametrize(("each", "main"), [(Doubling(), 2), (Lowered(), 1)])
def test_a_rewrite_is_in_every_mode_and_a_lowering_in_its_own(each, main):
    program, _, lowering = run_on(each)
    for mode in Mode:
        assert compute(lowering.make_variant(mode)) == (2 * X.sin() + 1).tolist()
    assert program.main.gm(X)[0].tolist() == (main * X.sin() + 1).tolist()


def test_dense_steps_run_without_what_serves_sparse_ones():
    for passes, dense, sparse in (
        ([Sparse()], 1, 2),
        ([SparseLowered()], 1, 2),
        ([Doubling(), Sparse(), SparseLowered()], 2, 8),
    ):
        program, _, lowering = run_on(*passes)
        assert compute(lowering.make_variant(Mode.DENSE)) == (dense * X.sin() + 1).tolist()
        assert compute(lowering.make_variant(Mode.REUSE)) == (sparse * X.sin() + 1).tolist()
        assert program.dense.gm(X)[0].tolist() == (dense * X.sin() + 1).tolist()


def test_variants_share_no_nodes():
    _, _, lowering = run_on(Lowered())
    one, other = (lowering.make_variant(mode) for mode in (Mode.SEARCH, Mode.REUSE))
    assert not set(one.graph.gm.graph.nodes) & set(other.graph.gm.graph.nodes)


def find_kept(graph):
    return list(graph.nodes)


def find_lost(graph):
    return list(graph.nodes)


class Reading(Doubling):
    """Notes the facts that it is given."""

    def find(self, facts: Facts, options):
        self.seen = facts.get(find_kept), facts.get(find_lost)
        return super().find(facts, options)


class ReadingLast(Reading):
    name = "reading_last"


class Idle(Reading):
    name = "idle"

    def find(self, facts, options):
        super().find(facts, options)
        return []


@pytest.mark.parametrize(
    ("middle", "kept", "lost"), [(Reading(), True, False), (Idle(), True, True)]
)
def test_an_edit_drops_the_facts_that_the_pass_does_not_keep(middle, kept, lost):
    last = ReadingLast()
    run_on(middle, last)
    assert (middle.seen[0] is last.seen[0], middle.seen[1] is last.seen[1]) == (kept, lost)


def test_graphs_are_dumped_around_each_edit(tmp_path):
    _, _, lowering = run_on(Doubling(), Lowered(), Idle(), Sparse(), dump=tmp_path)
    lowering.make_variant(Mode.SEARCH)
    lowering.make_variant(Mode.DENSE)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.glob("*.diff")) == [
        "01_doubling.diff",
        "02_sparse.diff",
        "03_lowered.search.diff",
        "04_lowered.dense.diff",
    ]
    assert (folder / "00_capture.py").exists()
    diff = (folder / "01_doubling.diff").read_text()
    assert any(line.startswith("+") and "mul" in line for line in diff.splitlines())


class Bare(Doubling):
    name = "bare"

    def rewrite(self, program, matches, options):
        graph = program.main.gm.graph
        with graph.inserting_after(matches[0].node):
            graph.call_function(torch.neg, (matches[0].node,))


class Unversioned(Doubling):
    name = "unversioned"

    def rewrite(self, program, matches, options):
        graph, node = program.main.gm.graph, matches[0].node
        with graph.inserting_after(node):
            added = graph.call_function(torch.ops.ditopt.toy.default, (node,))
        added.meta["example_value"] = node.meta["example_value"]


class LooseOutput(Doubling):
    name = "loose_output"

    def rewrite(self, program, matches, options):
        (output,) = program.main.gm.graph.find_nodes(op="output")
        output.args = ((*output.args[0], matches[0].node),)


class LooseInput(Doubling):
    name = "loose_input"

    def rewrite(self, program, matches, options):
        program.main.inputs.append(SlotRead(SlotRef(Slot("toy")), matches[0].node))


@pytest.fixture(scope="module")
def toy_op():
    library = torch.library.Library("ditopt", "FRAGMENT")
    library.define("toy(Tensor x) -> Tensor")
    yield
    library._destroy()


@pytest.mark.parametrize(
    ("each", "message"),
    [
        (Bare(), "'bare' wrote .*neg.* without an example_value"),
        (Unversioned(), "'unversioned' wrote the op ditopt.toy.* no version"),
        (LooseOutput(), "'loose_output' left 1 outputs .* but 0 slots"),
        (LooseInput(), "'loose_input' left placeholders that no slot feeds"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_a_pass_that_leaves_a_graph_ill_formed_is_named(toy_op, each, message):
    with pytest.raises(SpecError, match=message):
        run_on(each)


def test_a_lowering_is_checked_like_a_rewrite():
    class BareLowered(Lowered):
        name = "bare_lowered"

        def lower(self, variant, matches, options):
            graph, node = variant.graph.gm.graph, variant.at[matches[0].node]
            with graph.inserting_after(node):
                graph.call_function(torch.neg, (node,))

    _, _, lowering = run_on(BareLowered())
    with pytest.raises(SpecError, match="bare_lowered"):
        lowering.make_variant(Mode.SEARCH)


def test_errors_of_options_are_not_caught():
    class Refusing(Doubling):
        def find(self, facts, options):
            raise OptionError("Not this.")

    with pytest.raises(OptionError, match="Not this"):
        run_on(Refusing())


def test_nothing_found_edits_nothing():
    program, record, _ = run_on(Idle())
    assert record.passes[0].changed == 0 and program.dense is program.main
    assert program.main.gm(X)[0].tolist() == model(X).tolist()


def test_the_table_of_contents_is_in_order():
    names = [each.name for each in PASSES]
    assert len(set(names)) == len(names)
    sparse = [each.sparse_only for each in PASSES]
    # what serves sparse modes alone comes behind all others
    assert sparse == sorted(sparse)


def test_a_pass_of_all_modes_behind_one_of_sparse_modes_is_an_error():
    with pytest.raises(SpecError, match="'doubling' rewrites all modes, but stands behind"):
        run_on(Sparse(), Doubling())
