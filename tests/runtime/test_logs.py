import logging

import pytest
from pipeline import file_limit

from prism_hf.errors import DataError
from prism_hf.runtime.logs import blotted, log_file

log = logging.getLogger("prism_hf.test")
SECRETS = {
    "token": "hf_AbCdEfGhIjKlMnOpQrSt",
    "of an organization": "api_org_AbCdEfGhIjKlMnOp",
    "header": "Authorization: Bearer abcdef.ghijkl-mnop",
    "password": "https://somebody:s3cret-word@host/path",
    "signature": "https://bucket/file?X-Amz-Credential=AKIAabc&X-Amz-Signature=0123abcd&x=1",
    "signed": "https://bucket/file?Expires=1&Signature=abc~def&Key-Pair-Id=K",
}
HIDDEN = ("AbCdEfGh", "abcdef.ghijkl", "s3cret", "AKIA", "0123abcd", "abc~def")


@pytest.fixture(autouse=True)
def _info():
    logger = logging.getLogger("prism_hf")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


def says(folder):
    return (folder / "logs" / "run.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", list(SECRETS))
def test_secrets_never_reach_the_log(tmp_path, kind):
    with log_file(tmp_path, 0):
        log.info("before %s after", SECRETS[kind])
    text = says(tmp_path)
    assert "before " in text
    assert " after" in text
    assert not any(word in text for word in HIDDEN), text


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"])
def test_values_of_secret_variables_are_always_redacted(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "quite+ordinary/words")
    with log_file(tmp_path, 0):
        log.info("with quite+ordinary/words in it")
    assert f"with <{name}> in it" in says(tmp_path)


def test_tracebacks_of_unexpected_errors_are_in_the_log_without_secrets(tmp_path):
    def fails():
        raise ZeroDivisionError(SECRETS["password"])

    with pytest.raises(ZeroDivisionError), log_file(tmp_path, 0):
        fails()
    text = says(tmp_path)
    assert "Traceback" in text
    assert "in fails" in text
    assert "ZeroDivisionError" in text
    assert not any(word in text for word in HIDDEN), text


def test_a_prism_error_is_one_line_in_the_log(tmp_path):
    with pytest.raises(DataError), log_file(tmp_path, 0):
        raise DataError("no images")
    (line,) = says(tmp_path).splitlines()
    assert line.endswith("ERROR DataError: no images")


def test_ordinary_text_is_unchanged(tmp_path):
    text = "https://host/path?page=2 hf_hub hf-internal 3:4 a@b.c user:name Bearer of news"
    assert blotted(text) == text


def test_launches_append_and_each_process_has_its_own_log(tmp_path):
    for word in ("one", "two"):
        with log_file(tmp_path, 0):
            log.info(word)
    with log_file(tmp_path, 2) as path:
        log.warning("three")
    log.info("after")
    assert [line.split()[-1] for line in says(tmp_path).splitlines()] == ["one", "two"]
    assert path.name == "run-2.log"
    assert path.read_text().endswith("WARNING three\n")


def test_a_full_disk_does_not_end_the_run(tmp_path, capsys):
    done = []
    with file_limit(20), log_file(tmp_path, 0):
        for number in range(3):
            log.info("line %d", number)
            done.append(number)
    assert done == [0, 1, 2]
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_log_that_cannot_be_created_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file")
    with log_file(tmp_path, 0):
        log.info("line")
    assert capsys.readouterr().err.count("cannot be written") == 1
