"""How a run is watched, of its spec's How: validation beside training, commands on its checkpoints, trackers, limits.

None of it changes a bit of the run, and none of it waits: see docs/watch.md.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from trainer.spec_fields import NAME, RULES, Section, shown, size

WATCHED = ("validation", "eval", "track", "limits")
"""Sections that came when runs had records already: where one is at its default a How is written without it."""
MODEL = "{model}"
"""In a word of a command: the folder of the exported checkpoint. ``{out}``: an empty folder for what it writes,
``{step}``, ``{run}``.
"""


class ValidationSpec(Section):
    """The loss on data that is not trained on, and a sample, of stored checkpoints beside training."""

    every: int = size(0, low=0, high=1 << 20, text="of the stored checkpoints one in so many; 0: none")
    source: str = Field(
        "",
        max_length=4096,
        description="what to validate on, as data.source; unset: the validation part of the run's own data",
    )
    field: str = Field("text", min_length=1, max_length=4096, description="as data.field, of that source")
    prompt_field: str | None = Field(
        None, min_length=1, max_length=4096, description="as data.prompt_field, of that source"
    )
    messages: str | None = Field(None, min_length=1, max_length=4096, description="as data.messages, of that source")
    windows: int = size(100, high=1 << 20, text="windows of train.sequence tokens, spread evenly over that data")
    sample: str = Field("", max_length=2000, description="a text that is continued each time; unset: no sample")
    sample_tokens: int = size(64, high=4096, text="tokens of the sample, at most")
    timeout_s: float = Field(3600.0, gt=0, le=604_800, description="time limit of one validation, sample included")


class EvalSpec(Section):
    """A command of yours on exported checkpoints, beside training."""

    name: str = Field("eval", pattern=NAME, description=RULES[NAME])
    command: tuple[str, ...] = Field(
        min_length=1,
        max_length=64,
        description="words of the command, no shell; {model}: the exported folder, {out}: an empty folder for what it "
        "writes, {step}, {run}",
    )
    every: int = size(1, high=1 << 20, text="of the stored checkpoints one in so many")
    timeout_s: float = Field(3600.0, gt=0, le=604_800, description="time limit; then it is killed with all it started")
    results: str = Field(
        "",
        max_length=200,
        description="name of the JSON file below {out} that has its numbers (* and ? as in file names); unset: the "
        "newest one there, else the last line that it prints",
    )
    metrics: tuple[str, ...] = Field((), max_length=32, description="which of its numbers are kept; unset: all (32)")

    @model_validator(mode="after")
    def _check(self) -> EvalSpec:
        for word in self.command:
            if not word or len(word) > 4096 or "\0" in word:
                raise ValueError(f"command has the word {shown(word)}: words have 1 to 4096 characters; correct it")
        if not any(MODEL in word for word in self.command):
            raise ValueError(
                f"command {shown(' '.join(self.command))} names no {MODEL}: write it where the command takes the "
                "model's folder"
            )
        return self


class LimitsSpec(Section):
    """What a run may use, and who answers for it."""

    device_hours: float = Field(
        0.0,
        ge=0,
        le=1e9,
        description="ranks times hours, start-up and lost work included; then the run is parked: it saves, leaves and "
        "goes on with `runs resume` and a higher limit. 0: no limit",
    )
    owner: str = Field("", max_length=100, description="who answers for the hours; unset: whoever started the run")


class TrackSpec(Section):
    """Trackers that get the run's numbers; credentials are taken from their own environment alone."""

    tensorboard: str = Field("", max_length=1024, description="folder of event files, one below it a run; unset: none")
    wandb: str = Field("", max_length=128, description="project of Weights & Biases; unset: none")
    mlflow: str = Field("", max_length=256, description="experiment of MLflow; unset: none")
