"""From logits to what a request is told: its next token, its text as it comes, and its end."""

from collections.abc import Sequence

from benthic.errors import WorkFailed
from benthic.inference.admission import Admission
from benthic.inference.figures import Figures
from benthic.inference.job import Job
from benthic.inference.request import FinishReason, Token
from benthic.inference.sampling import Logits


class Results:
    """Chooses tokens and sends them out; who has all of them leaves."""

    def __init__(self, admission: Admission, figures: Figures) -> None:
        self._admission, self._figures = admission, figures

    def next_token(self, job: Job, logits: Logits, guess: int | None = None) -> bool:
        """Choose the next token and send it out, and note whether it was guessed; returns whether it goes on."""
        try:
            chosen = job.sampler.choose(logits, len(job.ids))
            if chosen is not None:
                job.sampler.accept(chosen)
        except WorkFailed as error:
            return self.finish(job, "error", str(error))
        except Exception as error:  # a constraint is the caller's code: it must not take the other requests with it
            where = "choosing a token" if job.sampling.constraint is None else "constraint"
            return self.finish(job, "error", f"{where}: {type(error).__name__}: {' '.join(str(error).split())}")
        if chosen is not None and chosen == guess:
            job.accepted += 1
            self._figures.accepted_tokens += 1
        if chosen is None or chosen in job.stop_ids:
            return self.finish(job, "stop")
        return self._send(job, chosen, logits)

    def finish(self, job: Job, reason: FinishReason, error: str | None = None, released: Sequence[Token] = ()) -> bool:
        """End a request and free what it holds; returns that it does not go on."""
        self._admission.remove(job)
        self.tell_end(job, reason, error, released)
        return False

    def tell_end(self, job: Job, reason: FinishReason, error: str | None, released: Sequence[Token] = ()) -> None:
        """Send the rest of the text and the outcome of a request that holds nothing any more."""
        self._figures.finished[reason] += 1
        tokens = [*released, *job.text.finish()]
        job.request.deliver(tokens, job.outcome(reason, error))

    def _send(self, job: Job, chosen: int, logits: Logits) -> bool:
        alternatives = logits.top(job.sampling.top_logprobs)
        released = job.add_token(Token(chosen, "", logits.logprob(chosen), alternatives))
        self._figures.generated_tokens += 1
        if job.text.stopped:
            return self.finish(job, "stop", released=released)
        if len(job.ids) == job.limit:
            return self.finish(job, "length", released=released)
        if released:
            job.request.deliver(released)
        return True
