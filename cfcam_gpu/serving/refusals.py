"""Why a request is not carried out: a status and one line."""


class Refusal(Exception):
    """Answered with a status of HTTP and the reason."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


class Left(Exception):
    """The client has closed its connection."""
