"""The one tree of errors, each with a stable code.

Every part raises from this tree; the server maps it to HTTP once (`offramp_server.api.problems`). A message is a
sentence for the person who caused the error: it names the field and says what is allowed, and never carries a
stack trace or a third party's exception text.
"""


class OfframpError(Exception):
    """Base of everything Offramp raises on purpose.

    Attributes:
        code: Stable, machine-readable name of the kind of error.
        message: One sentence for a person.
    """

    code = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(OfframpError):
    """The request cannot be served as it was sent.

    Attributes:
        field: Name of the offending field, if one can be named.
    """

    code = "bad_request"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class MalformedRequest(RequestError):
    """The body cannot be decoded: broken JSON, a truncated image, a wrong JSON type."""

    code = "malformed"


class InvalidValue(RequestError):
    """The body is well formed, but a value is not one the model can honour."""

    code = "invalid_value"


class NotFinite(RequestError):
    """The statistics of an exit are not numbers for this row: its input drove the network to NaN or infinity."""

    code = "not_finite"


class BodyTimeout(RequestError):
    """The body has not arrived within the operator's time."""

    code = "body_timeout"


class TooLarge(RequestError):
    """The body, an image or the number of rows is over the operator's limit."""

    code = "too_large"


class UnsupportedBody(RequestError):
    """The content type or content encoding is not one the route reads."""

    code = "unsupported_body"


class UnknownModel(RequestError):
    """No model of that name (or version) is served."""

    code = "unknown_model"


class Unauthorized(RequestError):
    """The API key is missing or wrong."""

    code = "unauthorized"


class NotPermitted(RequestError):
    """The operator has switched this operation off."""

    code = "not_permitted"


class Overloaded(OfframpError):
    """The server has more work than it may promise to do; try again later.

    Attributes:
        retry_after_s: Seconds until the backlog is predicted to be gone.
    """

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(OfframpError):
    """The server is loading, draining, or its engine has died."""

    code = "not_ready"


class DeadlineExceeded(OfframpError):
    """The deadline passes before any exit can answer, and the request asked to be rejected then."""

    code = "deadline_exceeded"


class Cancelled(OfframpError):
    """The client went away before its answer was ready."""

    code = "cancelled"


class StageFailed(OfframpError):
    """A stage raised; the rows of its batch are answered with this."""

    code = "stage_failed"


class DeviceUnavailable(OfframpError):
    """The device that was asked for cannot be used on this machine."""

    code = "device_unavailable"


class BundleError(OfframpError):
    """The bundle cannot be served."""

    code = "bundle"


class ManifestError(BundleError):
    """The manifest is missing, is not valid, or contradicts the files beside it."""

    code = "manifest"


class UnsupportedFormat(BundleError):
    """The bundle was written by a newer Offramp than this one."""

    code = "unsupported_format"


class DigestMismatch(BundleError):
    """A file's content is not what the manifest or calibration was made for."""

    code = "digest_mismatch"


class ExportError(OfframpError):
    """The network cannot be turned into a bundle; nothing was written."""

    code = "export"


class TraceError(ExportError):
    """The network cannot be traced into one ONNX program; the message says what to do."""

    code = "trace"


class SplitError(ExportError):
    """The program cannot be cut into stages."""

    code = "split"


class ParityError(ExportError):
    """Staged execution does not equal the network; the message names the tensor."""

    code = "parity"


class DataSetError(OfframpError):
    """A named data set cannot be downloaded, or its files are not what was published."""

    code = "data_set"


class CalibrationError(OfframpError):
    """The bundle cannot be calibrated or evaluated this way; nothing was written."""

    code = "calibration"


class UnfitData(CalibrationError):
    """The labelled data is not what this bundle can be calibrated or evaluated on; the message says what is wrong."""

    code = "unfit_data"


class BrokenTrace(CalibrationError):
    """A file is not a trace, or does not belong to this bundle."""

    code = "broken_trace"
