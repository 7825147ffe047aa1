"""Every error that a user can cause or meet. Each message says what is wrong, which value, and what to do next."""

__all__ = [
    "ArtifactError",
    "BenchError",
    "CheckpointError",
    "CompileError",
    "DeviceError",
    "MlcgenError",
    "RequestError",
    "SimulationError",
    "TargetError",
    "UnsupportedError",
]


class MlcgenError(Exception):
    """Base of all errors that mlcgen raises on purpose; the CLI prints it as one line and exits with 1."""


class CheckpointError(MlcgenError):
    """A model source is missing, truncated, inconsistent or lies about itself."""


class UnsupportedError(MlcgenError):
    """The input is well formed, but names something mlcgen does not have: an architecture, a config field, a format."""


class TargetError(MlcgenError):
    """A target is unknown, or cannot be compiled for or run here."""


class CompileError(MlcgenError):
    """Compilation failed after the input was accepted: no linker, no disk space, a kernel that does not build."""


class ArtifactError(MlcgenError):
    """A compiled artifact is damaged, of another schema version, or does not fit this machine."""


class DeviceError(MlcgenError):
    """A device failed, or has too little memory: what needed how much."""


class RequestError(MlcgenError):
    """One request cannot be served (empty prompt, too long, can never fit the pool). Other requests go on."""


class BenchError(MlcgenError):
    """A benchmark cannot run: a peer is not installed, has no model, or an engine's process ended early."""


class SimulationError(MlcgenError):
    """A simulation cannot run: step times or a trace are missing, damaged, or say too little."""
