"""The site reference page; ``python -m tools.docs.site > docs/site.md`` writes it anew."""

from __future__ import annotations

from fedward_client.config import (
    DatasetSection,
    ServerSection,
    SiteConfig,
    SiteSection,
    TrainerSection,
)
from fedward_client.data.options import (
    BoxSection,
    ChannelSection,
    ColumnSection,
    DeidentificationSection,
    ImageSection,
    LabelSection,
    MaskSection,
    PatientSection,
)
from fedward_client.importer.settings import FetchSection, ImporterSection, PacsSection
from fedward_client.policy.settings import PolicySection, StudyRule
from tools.docs.schema_tables import fields_table

_HEAD = """# The site's configuration: `site.toml`

Every key, its type, its default and its limits. An unknown key, a wrong type or an impossible
combination is refused with the key, the rule, the value and what to do (exit code 19). Relative
paths are relative to the file's folder. This page is generated from the schema.

```toml
version = 1

[site]
name = "st-mary"
state = "state"

[datasets.chest]
root = "export"
format = "dicom"
task = "classification"
classes = ["normal", "pneumonia"]
modality = ["CR", "DX"]
```
"""


def page() -> str:
    """The page in Markdown."""
    parts = (
        ("The file", "", SiteConfig),
        ("Site section", "[site]", SiteSection),
        ("Dataset section", "[datasets.NAME]", DatasetSection),
        ("Patient section", "[datasets.NAME.patients]", PatientSection),
        ("Image section", "[datasets.NAME.images]", ImageSection),
        (
            "Deidentification section",
            "[datasets.NAME.deidentification]",
            DeidentificationSection,
        ),
        ("Label section", "[datasets.NAME.labels]", LabelSection),
        ("Column section", "[datasets.NAME.table.COLUMN]", ColumnSection),
        ("Mask section", "[datasets.NAME.masks]", MaskSection),
        ("Box section", "[datasets.NAME.boxes]", BoxSection),
        ("Channel section", "[datasets.NAME.channels.CHANNEL]", ChannelSection),
        ("Fetch section", "[datasets.NAME.fetch]", FetchSection),
        ("Pacs section", "[pacs.NAME]", PacsSection),
        ("Importer section", "[importer]", ImporterSection),
        ("Server section", "[server]", ServerSection),
        ("Trainer section", "[trainer]", TrainerSection),
        ("Policy section", "[policy]", PolicySection),
        ("Study rule", "[[policy.studies]]", StudyRule),
    )
    lines = [_HEAD]
    for title, name, model in parts:
        lines += [f"## {title}", "", *([f"`{name}`", ""] if name else []), *fields_table(model), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
