"""What a run does with the connections of its model: how they run, and which of their parameters are trained."""

from torch import nn

from hcvision.connections import BACKENDS, Connection, HistoryConnection, StreamConnection
from hcvision.data import check_name

PARTS = tuple(StreamConnection.parts)  # of a connection


def choose_backend(model: nn.Module, backend: str) -> None:
    """Let all connections of a model, if it has any, run by ``backend``.

    Raises:
        ValueError: there is no such backend, or no kernel for the connections.
    """
    check_name("connection_backend", backend, BACKENDS)
    for module in model.modules():
        if isinstance(module, StreamConnection | HistoryConnection):
            module.choose_backend(backend)


def connection_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for module in model.modules() if isinstance(module, Connection) for p in module.parameters()]


def freeze_connections(model: nn.Module, part: str) -> None:
    """Hold the width-connections (alpha) or the depth-connections (beta) of a model still.

    Raises:
        ValueError: another part, a model without connections, or with connections that have no parameter in it.
    """
    if part not in PARTS:
        raise ValueError(f"connection_freeze must be one of {', '.join(PARTS)}, got {part!r}")
    connections = [module for module in model.modules() if isinstance(module, StreamConnection | HistoryConnection)]
    if not connections:
        raise ValueError(f"connection_freeze={part!r} needs a model with connections, this one has residual adds")
    held = [
        parameter
        for connection in connections
        for name, parameter in connection.named_parameters()
        if any(word in name for word in connection.parts[part])
    ]
    if not held:
        names = ", ".join(sorted({connection.name for connection in connections}))
        raise ValueError(f"connection_freeze={part!r} needs connections with parameters of it, {names} has none")
    for parameter in held:
        parameter.requires_grad_(False)
