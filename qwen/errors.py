"""The exception tree. Every message is fit to show to a user and says what to do next.

QwenError
├── InvalidRequest            the request cannot be served as given
│   ├── EmptyMessage
│   ├── MessageTooLong        refused by its size in characters, before it is tokenized
│   ├── PromptTooLong         does not fit the context, even without the earlier turns
│   ├── InvalidSetting        a sampling value outside its range
│   └── InvalidConversation   a history with unknown roles, wrong types or forged structure
├── CheckpointError           the weights cannot be had or cannot be read
│   ├── CheckpointNotFound
│   ├── CheckpointDamaged
│   ├── CheckpointUnsupported
│   ├── HubUnreachable
│   └── DiskFull
├── OutOfMemory               while loading or while generating
│   └── DoesNotFit            known before anything was fetched or loaded
├── TooManyRequests           the queue is full; says when to try again
├── BackendNotReady           the model is still being loaded
├── BackendFailed             an unexpected fault; the log has the traceback
│   └── EngineFailed          a remote engine breaks off, or answers what makes no sense
│       ├── EngineUnreachable it does not answer in time or at all
│       ├── EngineRefused     it does not take our key or does not have our model
│       └── EngineBusy        it has too many requests
└── StartupError              the server cannot start as configured (port taken, bad flag)
"""


class QwenError(Exception):
    """Base of every error that this project raises on purpose."""


class InvalidRequest(QwenError):
    """The request cannot be served as given; the caller can mend it."""


class EmptyMessage(InvalidRequest):
    """There is no text to answer."""


class MessageTooLong(InvalidRequest):
    """A message is larger than the context could ever hold."""


class PromptTooLong(InvalidRequest):
    """System prompt and newest message alone exceed the token budget."""


class InvalidSetting(InvalidRequest):
    """A sampling value is not a number or lies outside its range."""


class InvalidConversation(InvalidRequest):
    """A conversation sent by a client does not have the form that the page makes."""


class CheckpointError(QwenError):
    """The weights cannot be had or cannot be read."""


class CheckpointNotFound(CheckpointError):
    """Neither a folder, a file nor a hub has this name."""


class CheckpointDamaged(CheckpointError):
    """Files are there, but cut short, altered or incomplete."""


class CheckpointUnsupported(CheckpointError):
    """Files are sound, but of a kind that this version does not run."""


class HubUnreachable(CheckpointError):
    """No source of the weights answered."""


class DiskFull(CheckpointError):
    """There is no room for the weights."""


class OutOfMemory(QwenError):
    """Memory ran out while loading or while generating."""


class DoesNotFit(OutOfMemory):
    """A model needs more memory than is free, known before it was fetched or loaded."""


class TooManyRequests(QwenError):
    """As many requests wait as the server takes.

    Args:
        message: For the user.
        retry_after: Seconds after which there may be room.
        position: The place that the request would have had in the queue, from 1.
    """

    def __init__(self, message: str, *, retry_after: float, position: int) -> None:
        super().__init__(message)
        self.retry_after, self.position = retry_after, position


class BackendNotReady(QwenError):
    """The model is still being loaded."""


class BackendFailed(QwenError):
    """An unexpected fault in the model layer; the traceback is in the log."""


class EngineFailed(BackendFailed):
    """A remote engine breaks off, fails, or answers what makes no sense."""


class EngineUnreachable(EngineFailed):
    """A remote engine does not answer in time or at all."""


class EngineRefused(EngineFailed):
    """A remote engine does not take our key or does not have the model."""


class EngineBusy(EngineFailed):
    """A remote engine has more requests than it takes."""


class StartupError(QwenError):
    """The server cannot start as configured."""


_OUT_OF_MEMORY_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception of torch, safetensors or Python means that memory ran out.

    torch raises `torch.OutOfMemoryError` on CUDA but a plain `RuntimeError` from the CPU
    allocator, and safetensors an `OSError` when the file cannot be mapped.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(sign in str(error).lower() for sign in _OUT_OF_MEMORY_SIGNS)
