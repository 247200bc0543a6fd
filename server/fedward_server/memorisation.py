"""What attacks on a study's model and updates found: the ``audit`` of ``metrics.json``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Found(BaseModel):
    """Base of the parts: nothing unknown inside."""

    model_config = ConfigDict(extra="forbid")


class Membership(Found):
    """How well one attack tells who was trained on."""

    attack: str = Field(description="the attack, and on which model")
    members: int = Field(description="patients who were trained on")
    others: int = Field(description="patients who were not")
    auc: float = Field(description="area under the ROC curve; 0.5 is guessing")
    auc_error: float = Field(description="its standard error")
    true_positives: dict[str, tuple[float, float, float]] = Field(
        default_factory=dict,
        description="false positive rate to the true positive rate there, with its lower and upper "
        "bound; only rates that so many others can resolve",
    )


class LowerBound(Found):
    """The least ε with which an attack could have been so right."""

    attack: str = Field(description="what was attacked, and how")
    site: str = Field(default="", description="whose promise; empty for all sites together")
    epsilon: float = Field(description="lower bound on ε at δ; 0 where nothing was found")
    epsilon_jointly: float = Field(
        description="the same, so that all bounds of the audit hold together (Bonferroni); what "
        "the release gate reads"
    )
    promised: float | None = Field(
        default=None, description="ε that the plan promises; none: no privacy"
    )
    ceiling: float | None = Field(
        default=None, description="the largest bound that so many guesses could have shown"
    )
    guesses: int = Field(description="guesses, or trials, behind it")
    correct: int | None = Field(default=None, description="how many of the guesses were right")

    @property
    def broken(self) -> bool:
        """Whether more was found than was promised."""
        return self.promised is not None and self.epsilon_jointly > self.promised


class Inverted(Found):
    """How like a patient's image is what was drawn back out of one update."""

    private: bool = Field(description="whether the update was made private")
    mse: float = Field(description="mean squared error, pixels being 0 to 1")
    ssim: float = Field(description="structural similarity; 1 for the same image")
    correlation: float = Field(description="Pearson's correlation of the pixels")


class Audit(Found):
    """What attacks on a study's model and updates found."""

    study: str
    plan_sha256: str
    seed: int
    shadows: int = Field(description="federations trained on random halves of the patients")
    canaries: int = Field(description="patients made to be remembered, at each site")
    delta: float = Field(description="δ of the lower bounds")
    confidence: float = Field(description="with which each lower bound holds")
    memberships: list[Membership] = Field(default_factory=list)
    bounds: list[LowerBound] = Field(default_factory=list)
    inversions: list[Inverted] = Field(default_factory=list)
    seconds: float = Field(default=0.0, description="wall seconds of the audit")

    @property
    def broken(self) -> list[LowerBound]:
        """Bounds above what was promised."""
        return [bound for bound in self.bounds if bound.broken]
