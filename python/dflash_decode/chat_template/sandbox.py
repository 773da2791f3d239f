"""Jinja's sandbox with a budget (budget.py): every loop and every growing value is paid for before it runs.

A template is rewritten between parsing and compiling. Each run of statements pays for its nodes when it is entered, so
no loop is free, and nodes that make or compare values pay for their size. Calls, filters, tests and operators pay in
the sandbox's hooks (costs.py). No constant is computed while the template is compiled.
"""

import functools
import operator
from collections.abc import Iterator
from typing import Any

import jinja2
from jinja2 import nodes, pass_context, pass_eval_context
from jinja2.runtime import LoopContext, Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from . import costs
from .budget import STEP, budget

# Filters of the rewritten tree; no template can write these names.
_BLOCK, _MADE, _JOINED, _COMPARED = "(block)", "(made)", "(joined)", "(compared)"


class Environment(ImmutableSandboxedEnvironment):
    """A sandbox for templates made with `template` and run inside `spending`."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **options):
        super().__init__(optimized=False, finalize=_finalize, undefined=Undefined, **options)
        self.filters = {name: costs.paid_filter(name, function) for name, function in self.filters.items()}
        tests: dict[str, Any] = self.tests
        self.tests = {name: costs.paid_test(name, function) for name, function in tests.items()}
        self.filters |= {_BLOCK: lambda units: budget().spend(*units), _MADE: lambda value: budget().made(value),
                         _JOINED: _joined, _COMPARED: _compared}

    def template(self, text: str):
        """Compiles a template."""
        tree = _Paying().visit(self.parse(text))
        tree.set_environment(self)
        return self.from_string(tree)

    def call_binop(self, context, operator, left, right):
        costs.pay_operator(operator, left, right)
        return budget().made(super().call_binop(context, operator, left, right))

    def call(__self, __context, __obj, *args, **kwargs):  # keywords are the template's
        spent = budget()
        spent.spend(STEP)
        if not isinstance(__obj, (Macro, LoopContext)):  # whose bodies pay for themselves
            args = tuple(map(spent.listed, args))
            costs.pay_call(__obj, args, kwargs)
        made = super().call(__context, __obj, *args, **kwargs)
        return spent.each(made) if isinstance(made, Iterator) else spent.made(made)

    def getitem(self, obj, argument):
        if not isinstance(argument, (str, int)):  # a tuple, say, is hashed from end to end
            budget().spend(budget().size(argument))
        return super().getitem(obj, argument)

    def wrap_str_format(self, value):
        made = super().wrap_str_format(value)
        if made is None:
            return None

        def paid(*args, **kwargs):
            costs.pay_format(value.__self__, args, kwargs)
            return made(*args, **kwargs)

        return functools.update_wrapper(paid, value)


class Undefined(jinja2.Undefined):
    """An undefined value, which also pays: it costs more to make than a defined one costs to find."""

    __slots__ = ()

    def __init__(self, *args, **kwargs):
        budget().spend(STEP, 2)
        super().__init__(*args, **kwargs)


@pass_context  # so that the compiler does not call it for constants
def _finalize(context, value):
    return budget().written(value)


@pass_eval_context
def _joined(context, values):
    spent = budget()
    spent.allow(spent.sizes(values))
    for value in values:
        if not isinstance(value, str):
            spent.written(value)
    return spent.made((markup_join if context.autoescape else str_join)(values))


_COMPARISONS = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt,
                "gteq": operator.ge, "in": lambda left, right: left in right,
                "notin": lambda left, right: left not in right}


def _compared(left, *rest):
    """Pays for a comparison. rest: an operator's name and a right side, or several."""
    for name, right in zip(rest[::2], rest[1::2], strict=True):
        right = budget().listed(right) if name in ("in", "notin") else right
        costs.pay_comparison(name, left, right)
        found = _COMPARISONS[name](left, right)
        if not found:
            break
        left = right
    return found


class _Paying(NodeTransformer):
    """Inserts the payments into a template's syntax tree."""

    def generic_visit(self, node, *args, **kwargs):
        super().generic_visit(node, *args, **kwargs)
        for field in ("body", "else_"):
            if statements := getattr(node, field, None):
                pay = nodes.ExprStmt(_price(*statements))
                pay.set_lineno(statements[0].lineno)
                statements.insert(0, pay)
        return node

    def visit_For(self, node):
        self.generic_visit(node)
        if not node.body:
            node.body = [nodes.ExprStmt(_price(), lineno=node.lineno)]
        if node.test:
            node.test = nodes.And(_price(node.test), node.test)
        return node

    def visit_List(self, node):
        self.generic_visit(node)
        return node if _constant(node) or getattr(node, "ctx", "load") != "load" else _filter(node, _MADE)

    visit_Tuple = visit_Dict = visit_List

    def visit_Getitem(self, node):
        self.generic_visit(node)
        return _filter(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node):
        self.generic_visit(node)
        return _filter(nodes.Tuple(node.nodes, "load", lineno=node.lineno), _JOINED)

    def visit_Compare(self, node):
        self.generic_visit(node)
        if len(node.ops) == 1 and _bounded(node.expr, node.ops[0]):
            return node
        return _filter(node.expr, _COMPARED, *(n for one in node.ops for n in (nodes.Const(one.op), one.expr)))


def _bounded(left: nodes.Expr, operand: nodes.Operand) -> bool:
    """Whether a constant bounds the cost of a comparison. A constant that is searched does not."""
    return _constant(operand.expr) or (_constant(left) and operand.op not in ("in", "notin"))


def _filter(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [*args], [], None, None, lineno=node.lineno)


def _constant(node: nodes.Node) -> bool:
    if isinstance(node, (nodes.List, nodes.Tuple)):
        return all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Const)


def _price(*run: nodes.Node) -> nodes.Filter:
    """Pays for nodes that run in sequence, except the statements inside them, which pay when they are entered."""
    count, text = map(sum, zip((0, 0), *map(_parts, run), strict=True))
    return _filter(nodes.Const((STEP + text, 1 + count // 2), lineno=run[0].lineno if run else 1), _BLOCK)


def _parts(node: nodes.Node) -> tuple[int, int]:
    """The number of nodes, and of characters of the template's text."""
    if isinstance(node, nodes.TemplateData):
        return 1, len(node.data)
    fields = [field for name, field in node.iter_fields() if name not in ("body", "else_")]
    parts = [part for field in fields for part in (field if isinstance(field, list) else [field])]
    count, text = map(sum, zip((1, 0), *(_parts(part) for part in parts if isinstance(part, nodes.Node)), strict=True))
    return count, text
