"""Reads multipart/form-data: `image` parts and form fields, within bounds."""

from dataclasses import dataclass, field

from offramp_contract.errors import InvalidValue, MalformedRequest, TooLarge
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from offramp_server.fields import FIELDS

MAX_FIELD_BYTES = 4096


@dataclass(slots=True)
class Form:
    """What a multipart body holds.

    Attributes:
        images: The `image` parts, in order.
        fields: The other parts as text, by name.
    """

    images: list[bytes] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)


def read_form(body: bytes, content_type: str, max_images: int) -> Form:
    """Read a multipart body whose size has been bounded already.

    Raises:
        MalformedRequest: If it is not valid multipart/form-data.
        TooLarge: If it holds more than `max_images` images, or a field is over `MAX_FIELD_BYTES`.
        InvalidValue: If a part is neither `image` nor a field, or a field is given twice.
    """
    _, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary")
    if not boundary or len(boundary) > 200:
        raise MalformedRequest("content-type: multipart/form-data needs a boundary", "content-type")
    parts = _Parts(max_images)
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": parts.begin,
            "on_header_field": parts.header_name,
            "on_header_value": parts.header_value,
            "on_header_end": parts.header_end,
            "on_headers_finished": parts.headers_finished,
            "on_part_data": parts.data,
            "on_part_end": parts.end,
            "on_end": parts.complete,
        },
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise MalformedRequest("body: it is not valid multipart/form-data", "body") from None
    if not parts.is_complete:
        raise MalformedRequest("body: its last multipart boundary is missing", "body")
    return parts.form


class _Parts:
    """Collects the parser's events into a form; the methods are its callbacks."""

    def __init__(self, max_images: int) -> None:
        self.form = Form()
        self.is_complete = False
        self._max_images = max_images
        self._name = ""
        self._chunks: list[bytes] = []
        self._num_bytes = 0
        self._header_name = self._header_value = b""

    def begin(self) -> None:
        self._name, self._chunks, self._num_bytes = "", [], 0

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(self._header_value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._header_name = self._header_value = b""

    def headers_finished(self) -> None:
        name = self._name
        if name == "image":
            if len(self.form.images) >= self._max_images:
                raise TooLarge(f"image: more than the operator's limit of {self._max_images} in one request", "image")
        elif name not in FIELDS:
            known = ", ".join(FIELDS)
            raise InvalidValue(f"{name[:80] or 'part'}: a part must be named image or one of {known}", name[:80])
        elif name in self.form.fields:
            raise InvalidValue(f"{name}: it is given twice", name)

    def data(self, data: bytes, start: int, end: int) -> None:
        self._num_bytes += end - start
        if self._name != "image" and self._num_bytes > MAX_FIELD_BYTES:
            raise TooLarge(f"{self._name}: a form field holds at most {MAX_FIELD_BYTES} bytes", self._name)
        self._chunks.append(data[start:end])

    def end(self) -> None:
        content = b"".join(self._chunks)
        if self._name == "image":
            self.form.images.append(content)
        else:
            self.form.fields[self._name] = content.decode("utf-8", "replace")

    def complete(self) -> None:
        self.is_complete = True
