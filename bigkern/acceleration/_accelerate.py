"""Finds what can be swapped in a model, swaps all of it or nothing, and reports."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from bigkern.acceleration import _fusion
from bigkern.acceleration._fusion import FusedSequential
from bigkern.acceleration._rules import RULES, objection
from bigkern.acceleration.report import ROOT, Report, Row, Swap

# A path, a pattern of paths, or a type of module.
Selector = str | type[nn.Module]


def accelerate(
    model: nn.Module,
    *,
    only: Selector | Sequence[Selector] | None = None,
    skip: Selector | Sequence[Selector] | None = None,
    fuse: bool = True,
) -> Report:
    """Make the layers of ``model`` bigkern's, in place, and say of each what became of it.

    Swapped by their exact type, wherever they are: LayerNorm, RMSNorm, Conv1d, Conv2d, RNN, LSTM, GRU and their cells,
    MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder, TransformerDecoder and
    Transformer.  A module changes its class and nothing else: it is the same object with the same parameters, buffers,
    hooks and mode, so optimizers, schedulers, ``state_dict``, tied weights and tied modules stay what they were.

    Left alone, with the reason in the report: subclasses, parametrized, quantized and sharded modules, modules of
    which this instance's ``forward`` was replaced, and weights the kernels do not know.  Pruned modules, and others
    with hooks, keep their hooks, which go on being called.

    Args:
        model: any module; bigkern.nn's own in it are left as they are.
        only: swap these alone.  A path (``"encoder"``, with all below it), a pattern (``"*.norm?"``, as
            :mod:`fnmatch` reads it), a type, or several of them.
        skip: leave these, selected in the same way, alone.
        fuse: where kernels run, a torch.nn.Sequential runs each convolution together with the batch norm (in
            evaluation, where no gradient of their parameters is asked for), the activation (ReLU, GELU, SiLU) and the
            max pooling that follow it.  The residual sum before a layer norm is part of it in the Transformer layers
            whatever this says; elsewhere nobody can be certain of it.

    Returns:
        :class:`Report`: a table to print, ``restore()`` and ``verify()``.

    Raises:
        TypeError: ``model`` is no module, or one that TorchScript or torch.export has made.
        ValueError: a parameter or buffer on the meta device; a selector that matches nothing.

    The model is as it was whatever is raised.

    Example::

        report = bigkern.accelerate(model)
        print(report)
        assert report.verify(batch).passed
        report.restore()
    """
    _check_model(model)
    paths = _paths(model)
    chosen = None if only is None else _select("only", only, paths)
    skipped = set() if skip is None else _select("skip", skip, paths)
    default = next((param for param in model.parameters() if param.is_floating_point()), torch.empty(0))

    rows: list[Row] = []
    swaps: list[Swap] = []
    others: Counter[str] = Counter()
    nested = _in_nesting_encoders(paths, chosen, skipped)
    for module, names in paths.items():
        kind = type(module)
        if _is_ours(module):
            continue
        if not isinstance(module, tuple(RULES)):
            if any(True for _ in module.parameters(recurse=False)):
                others[kind.__name__] += 1
            continue
        if chosen is not None and module not in chosen:
            continue
        reason = "skip" if module in skipped else objection(module) or nested.get(module)
        if reason is not None:
            rows.append(Row(names, kind.__name__, None, "", "", reason))
            continue
        rule = RULES[kind]
        name, why = rule.backend(module, default)
        rows.append(Row(names, kind.__name__, _full_name(rule.ours), name, why, _note(module, rule.note)))
        swaps.append(Swap(module, kind, rule.ours, rule.attributes))

    report = Report(model, rows, swaps, others, _notes(model))
    with report.undone_on_error():
        report.apply()
        if fuse:
            _fuse(report, paths, chosen, skipped)
    order = {names[0]: index for index, names in enumerate(paths.values())}
    report.rows.sort(key=lambda row: order[row.path])
    return report


def _check_model(model: nn.Module) -> None:
    if type(model).__name__ == "ExportedProgram":
        raise TypeError(
            "accelerate: model is an ExportedProgram, whose layers are operators by now; accelerate the module "
            "before torch.export.export"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "accelerate: model was made by torch.jit.script or trace, whose layers cannot be swapped; accelerate the "
            "module it was made from, and script no more: torch.compile and torch.export take it"
        )
    fx = sys.modules.get("torch.fx")
    if fx is not None and isinstance(model, fx.GraphModule):
        # torch.export adds one call of a module of its own, which checks the inputs.
        called = {node.target for node in model.graph.nodes if node.op == "call_module"} - {"_guards_fn"}
        if not called:
            raise TypeError(
                "accelerate: model is a graph of operators, as torch.export makes it, and has no layers to swap; "
                "accelerate the module before it is exported"
            )
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if tensor.is_meta:
                raise ValueError(
                    f"accelerate: {kind} {name} is on the meta device; give the model memory and weights first, with "
                    "model.to_empty(device=...) and load_state_dict"
                )


def _paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all its names: one that stands in two places is one."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name or ROOT)
    return found


def _select(argument: str, selectors: Selector | Sequence[Selector], paths: dict[nn.Module, list[str]]) -> set:
    if isinstance(selectors, (str, type)):
        selectors = [selectors]
    found = set()
    for selector in selectors:
        if not isinstance(selector, (str, type)):
            raise TypeError(
                f"accelerate: {argument} has a {type(selector).__name__}; expected paths, patterns or module types"
            )
        matching = {module for module, names in paths.items() if _matches(module, names, selector)}
        if not matching:
            near = ", ".join(sorted({names[0] for names in paths.values()})[1:6])
            raise ValueError(f"accelerate: {argument}={selector!r} matches no module; the model has {near or ROOT} ...")
        found |= matching
    return found


def _matches(module: nn.Module, names: list[str], selector: Selector) -> bool:
    if isinstance(selector, type):
        return type(module) is selector
    return any(fnmatchcase(name, selector) or fnmatchcase(name, f"{selector}.*") or selector == ROOT for name in names)


def _is_ours(module: nn.Module) -> bool:
    return any(base.__module__.startswith("bigkern.") for base in type(module).__mro__)


def _in_nesting_encoders(paths: dict[nn.Module, list[str]], chosen: set | None, skipped: set) -> dict[nn.Module, str]:
    """Layers of a torch.nn.TransformerEncoder that stays and makes nested tensors, which bigkern's layers refuse."""
    found: dict[nn.Module, str] = {}
    for module, names in paths.items():
        if not isinstance(module, nn.TransformerEncoder) or _is_ours(module):
            continue
        stays = module in skipped or (chosen is not None and module not in chosen) or objection(module) is not None
        if stays and getattr(module, "use_nested_tensor", False):
            reason = f"{names[0]} stays torch's and passes nested tensors to its layers in evaluation"
            found.update((part, reason) for layer in module.layers for part in layer.modules())
    return found


def _note(module: nn.Module, note: str) -> str:
    hooks = sum(
        len(getattr(module, name))
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
    kept = f"keeps its {'hook' if hooks == 1 else f'{hooks} hooks'}" if hooks else ""
    return "; ".join(part for part in (kept, note) if part)


def _full_name(kind: type) -> str:
    return f"bigkern.nn.{kind.__name__}"


def _fuse(report: Report, paths: dict[nn.Module, list[str]], chosen: set | None, skipped: set) -> None:
    for module, names in paths.items():
        if not isinstance(module, nn.Sequential) or isinstance(module, FusedSequential):
            continue
        if module in skipped or (chosen is not None and module not in chosen):
            continue
        runs = _fusion.runs(module)
        if not runs:
            continue
        kind = type(module)
        if kind is not nn.Sequential or "forward" in vars(module):
            reason = (
                "not fused: a subclass of Sequential" if kind is not nn.Sequential else "not fused: its own forward"
            )
            report.rows.append(Row(names, kind.__name__, None, "", "", reason))
            continue
        report.rows.append(
            Row(
                names,
                kind.__name__,
                "FusedSequential",
                "",
                "",
                f"one operation each where kernels run: {', '.join(runs)}",
            )
        )
        report.add(Swap(module, kind, FusedSequential, {}))


def _notes(model: nn.Module) -> list[str]:
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation is None or implementation == "bigkern" or not hasattr(model, "set_attn_implementation"):
        return []
    return [
        f'attention of transformers runs "{implementation}": bigkern.integrations.transformers.register() and '
        'model.set_attn_implementation("bigkern") make it bigkern\'s'
    ]
