"""What the documents refer to exists, and what they tell others to do does what they say."""

import base64
import hmac
import re
from pathlib import Path

import pytest
import yaml

from braintumor.deployment import KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, sign

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPERATING = (ROOT / "docs/operating.md").read_text()

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def prose(document: Path) -> str:
    """The text without its blocks of code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    return re.sub(r"^ {4}.*$", "", text, flags=re.M)


def anchors(document: Path) -> set[str]:
    """The headings' names in addresses, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@documents
def test_every_relative_link_and_picture_exists(document: Path) -> None:
    text = prose(document)
    targets = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_documents_have_links_and_pictures_to_look_at() -> None:
    text = "".join(map(prose, DOCUMENTS))
    assert len(re.findall(r"\]\((?!http)", text)) > 30
    assert "](review-ledger.png)" in text


def test_the_signature_is_checked_in_the_document_as_the_hook_makes_it() -> None:
    (check,) = re.findall(r"^ +(signed = .*)\n +(hmac\.compare_digest.*)$", OPERATING, re.M)
    body, secret = b'{"index": 3}', "of the hook"
    headers = {KEY_HEADER: "0f" * 32, TIMESTAMP_HEADER: "1760000000"}
    headers[SIGNATURE_HEADER] = sign(secret, headers[KEY_HEADER], headers[TIMESTAMP_HEADER], body)

    def holds(content: bytes) -> bool:
        known = dict(headers=headers, body=content, secret=secret.encode(), hmac=hmac, base64=base64)
        exec(check[0], known)
        return bool(eval(check[1], known))

    assert holds(body)
    assert not holds(body + b" ")


def test_the_nightly_look_at_the_ledger_is_at_the_model_that_the_promoter_watches() -> None:
    (row,) = [line for line in OPERATING.splitlines() if line.startswith("| ledger |")]
    (file,) = re.findall(r"`braintumor history --verify --contains \w+ --params (\S+)`", row)
    deployments = list(yaml.safe_load_all((ROOT / "k8s/mlflow/promoter.yaml").read_text()))
    (promoter,) = deployments[1]["spec"]["template"]["spec"]["containers"]
    assert promoter["args"][-2:] == ["--params", f"/work/{file}"]
    assert (ROOT / file).is_file()
