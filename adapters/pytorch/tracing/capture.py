"""From a module to a `Program`: torch.export, flattened, with the module left exactly as it was."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from prunus.adapters.pytorch.tracing.program import Program, Step, operator_name
from prunus.core.errors import TraceError


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool = False) -> Program:
    """The program that `model(*args, **kwargs)` runs, in eval mode unless `training`.

    Raises TraceError with the reason if torch.export cannot capture the model.
    """
    with _prepared(model, training), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(model, args, dict(kwargs), strict=False)
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise TraceError(f"{type(model).__name__} cannot be captured by torch.export: {reason}") from error
    return _Flattener(model, exported).program()


@contextmanager
def _prepared(model: nn.Module, training: bool) -> Iterator[None]:
    """Sets the mode and empties caches of derived tensors; puts both back."""
    modes = {module: module.training for module in model.modules()}
    caches = {
        (module, name): dict(value)
        for module in model.modules()
        for name, value in vars(module).items()
        if "cache" in name and isinstance(value, dict)
    }
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()} if training else {}
    for module, name in caches:
        vars(module)[name].clear()
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for (module, name), entries in caches.items():
            cache = vars(module)[name]
            cache.clear()
            cache.update(entries)
        with torch.no_grad():
            for buffer, before in buffers.values():
                buffer.copy_(before)


def tensor_names(model: nn.Module) -> dict[str, str]:
    """Every name a parameter or buffer goes by -> the first of them: tied tensors have one name."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for source in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in source:
            names[name] = first.setdefault(id(tensor), name)
    return names


class _Flattener:
    """Turns an exported program into steps, inlining the subgraphs of grad and autocast regions."""

    def __init__(self, model: nn.Module, exported: torch.export.ExportedProgram) -> None:
        self.exported = exported
        self.names = tensor_names(model)
        self.classes = {path: type(module).__name__ for path, module in model.named_modules()}
        self.steps: list[Step] = []
        self.constants: dict[str, Tensor] = {}
        self.tensors: dict[str, Step] = {}
        for name, buffer in model.named_buffers():
            if name not in exported.state_dict:
                self.constants[name] = buffer.detach().clone()

    def program(self) -> Program:
        graph = self.exported.graph_module
        environment: dict[fx.Node, Any] = {}
        specs = iter(self.exported.graph_signature.input_specs)
        inputs: list[Step | None] = []
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                spec = next(specs)
                step = self._placeholder(node, spec)
                environment[node] = step
                if spec.kind == InputKind.USER_INPUT:
                    inputs.append(step)
        outputs = self._run(graph, environment, "")
        in_spec, out_spec = self.exported.call_spec.in_spec, self.exported.call_spec.out_spec
        return Program(self.steps, list(outputs), in_spec, out_spec, self.constants, inputs)

    def _placeholder(self, node: fx.Node, spec: Any) -> Step | None:
        shape = _shapes(node.meta.get("val"))
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            name = self.names[spec.target]
            if name not in self.tensors:
                self.tensors[name] = self._add("tensor", None, {}, shape, name=name)
            return self.tensors[name]
        if spec.kind == InputKind.USER_INPUT:
            return self._add("input", None, {}, shape, name=node.name)
        if spec.kind == InputKind.CONSTANT_TENSOR:
            self.constants[node.name] = self.exported.constants[spec.target]
            return self._add("constant", None, {}, shape, name=node.name)
        return None

    def _add(
        self,
        op: str,
        target: Any,
        arguments: dict[str, Any],
        shapes: Any,
        owner: str = "",
        name: str = "",
    ) -> Step:
        step = Step(len(self.steps), op, target, arguments, shapes, owner, self.classes.get(owner, ""), name)
        self.steps.append(step)
        return step

    def _run(self, module: fx.GraphModule, environment: dict[fx.Node, Any], owner: str) -> tuple[Any, ...]:
        outputs: tuple[Any, ...] = ()
        for node in module.graph.nodes:
            if node.op == "get_attr":
                environment[node] = self._attribute(module, node)
            elif node.op == "call_function":
                environment[node] = self._call(module, node, environment, _owner(node) or owner)
            elif node.op == "output":
                outputs = fx.node.map_arg(node.args[0], environment.__getitem__)  # type: ignore[assignment]
        return tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> Any:
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, fx.GraphModule):
            return value
        self.constants[node.name] = value
        return self._add("constant", None, {}, _shapes(value), name=node.name)

    def _call(self, module: fx.GraphModule, node: fx.Node, environment: dict[fx.Node, Any], owner: str) -> Any:
        args = fx.node.map_arg(node.args, environment.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, environment.__getitem__)
        if node.target is operator.getitem and isinstance(args[0], list | tuple):
            return args[0][args[1]]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._inline(node, args, owner)
        if node.target is operator.getitem:
            return self._add("getitem", node.target, {"a": args[0], "b": args[1]}, _value(node), owner)
        if not isinstance(node.target, torch._ops.OpOverload):
            named = {str(i): value for i, value in enumerate(args)} | dict(kwargs)
            return self._add(operator_name(node.target), node.target, named, _value(node), owner)
        named = _bind(node.target, args, kwargs)
        return self._add(operator_name(node.target), node.target, named, _value(node), owner)

    def _inline(self, node: fx.Node, args: Any, owner: str) -> Any:
        """Regions with other grad or autocast modes compute what their body computes."""
        body = next((a for a in args if isinstance(a, fx.GraphModule)), None)
        if body is None:
            raise TraceError(f"operator {node.target} in {owner or 'the model'} is not supported", node=node.name)
        operands = args[args.index(body) + 1 :]
        inner: dict[fx.Node, Any] = {}
        places = [n for n in body.graph.nodes if n.op == "placeholder"]
        inner.update(zip(places, operands, strict=True))
        return self._run(body, inner, owner)


def _bind(target: torch._ops.OpOverload, args: Any, kwargs: Any) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(args):
            named[argument.name] = args[position]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    return named


def _owner(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return str(next(reversed(stack.values()))[0])


def _value(node: fx.Node) -> Any:
    return _shapes(node.meta.get("val"))


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(int(size) for size in value.shape)
    if isinstance(value, list | tuple):
        return [_shapes(item) for item in value]
    return None


def flat_inputs(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The example inputs in the program's order."""
    leaves: list[Any] = pytree.tree_flatten((args, dict(kwargs)))[0]
    return leaves
