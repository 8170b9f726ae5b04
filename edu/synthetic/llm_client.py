"""A client of any OpenAI-compatible endpoint: one question, one JSON answer, and errors that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edu.config.network import is_loopback

ADVICE = "--teacher is the endpoint's address (it ends in /v1; openai means OPENAI_BASE_URL), OPENAI_API_KEY its key"


@dataclass(frozen=True)
class Reply:
    """Text that a model wrote, and the tokens that the endpoint counted."""

    text: str
    tokens_in: int
    tokens_out: int


class Endpoint:
    """An endpoint and one of its models. May be asked from many threads at once."""

    def __init__(self, base_url: str, api_key: str, model: str, max_retries: int = 3) -> None:
        """base_url: "" for OpenAI's own. model: "" for the only one there is, see `choose_model`. Close it after use."""
        import openai  # here, since it costs 0.6 s and only who asks needs it

        transport = openai.DefaultHttpxClient(trust_env=not is_loopback(base_url))
        options: dict[str, Any] = {"timeout": 120.0, "max_retries": max_retries, "http_client": transport}
        self.client = openai.OpenAI(
            base_url=base_url or "https://api.openai.com/v1", api_key=api_key or "none", **options
        )
        self.url = str(self.client.base_url)
        self.structured = True
        self.model = model

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def choose_model(self) -> str:
        """The model to ask: the one named, or the endpoint's only one; ValueError when it has not just one."""
        if not self.model:
            with self.errors():
                names = [model.id for model in self.client.models.list()]
            if len(names) != 1:
                some = ", ".join(names[:5])
                raise ValueError(f"--model: name one of the {len(names)} models of {self.url} ({some}, ...)")
            self.model = names[0]
        return self.model

    def ask(self, system: str, user: str, seed: int, schema: dict[str, Any]) -> Reply:
        """One answer, in the JSON schema's form where the endpoint can hold to one; else it is asked without.

        Raises ValueError for what the user must set right, OSError when the endpoint does not answer (any more).
        """
        import openai
        from openai.types.chat import ChatCompletion

        messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        form: Any = {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": schema}}
        structured = self.structured  # as this thread saw it: another may find out meanwhile
        with self.errors():
            try:
                reply = self._create(messages, seed, {"response_format": form} if structured else {})
            except openai.BadRequestError:
                if not structured:
                    raise
                reply = self._create(messages, seed, {})
                self.structured = False
        if not isinstance(reply, ChatCompletion):  # a web page, say
            raise ValueError(f"{self.url} does not speak the OpenAI protocol. {ADVICE}")
        text = (reply.choices[0].message.content or "") if reply.choices else ""
        return (
            Reply(text, reply.usage.prompt_tokens, reply.usage.completion_tokens) if reply.usage else Reply(text, 0, 0)
        )

    def _create(self, messages: Any, seed: int, options: Any) -> Any:
        return self.client.chat.completions.create(model=self.model, messages=messages, seed=seed, **options)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what the client raises into one clear ValueError (the settings) or OSError (the endpoint)."""
        import openai

        try:
            yield
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ValueError(f"{self.url} refuses the key: {_said(error)}. {ADVICE}") from None
        except (openai.BadRequestError, openai.NotFoundError, openai.UnprocessableEntityError) as error:
            raise ValueError(f"{self.url} refuses the request: {_said(error)}. Is --model right? {ADVICE}") from None
        except openai.APIError as error:
            raise OSError(
                f"no answer from {self.url}: {_said(error)}. {ADVICE}. Rerun the command to continue"
            ) from None


def _said(error: Any) -> str:
    """The endpoint's own words, on one line."""
    return " ".join(str(error.message).split()).rstrip(".")[:300]
