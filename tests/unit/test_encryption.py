"""Keys and tokens."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from celery import Celery
from cryptography.fernet import Fernet

from durable import Durable
from durable.codec import Codec
from durable.config import Settings, load_settings
from durable.encryption import Keyring, name_of
from durable.errors import ConfigurationError, EncryptionError, PayloadError
from durable.failures import decode_failure, encode_failure

OLD, NEW = (Fernet.generate_key().decode() for _ in range(2))

VALUES: list[Any] = [None, 1.5, 'ü\n"', {"a": [1e16, -0.0]}, {"__type__": "durable:encrypted"}]


def codec(*keys: str, **options: Any) -> Codec:
    return Codec(keyring=Keyring(keys, **options))


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back_and_its_text_is_json_that_names_the_key(value: Any) -> None:
    text = codec(NEW, OLD).encode(value, "a test")
    stored = json.loads(text)
    assert (stored["__type__"], stored["__key__"]) == ("durable:encrypted", name_of(NEW))
    assert repr(codec(NEW).decode(text)) == repr(value)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_old_keys_and_plain_text_are_read(value: Any) -> None:
    for text in (codec(OLD).encode(value, "a test"), Codec().encode(value, "a test")):
        assert repr(codec(NEW, OLD).decode(text)) == repr(value)


def test_it_is_read_after_it_went_through_another_json_writer() -> None:
    text = json.dumps({"x": [json.loads(codec(OLD).encode("s", "a test"))]}, sort_keys=True)
    assert codec(OLD).decode(text) == {"x": ["s"]}


def test_text_that_looks_like_it_is_left_alone() -> None:
    for value in ('"durable:encrypted"', {"k": "durable:encrypted"}, ["durable:encrypted"]):
        assert Codec().decode(Codec().encode(value, "a test")) == value
        assert codec(OLD).decode(codec(OLD).encode(value, "a test")) == value


def test_switched_off_it_writes_plain_text_and_still_reads() -> None:
    off = codec(OLD, writes=False)
    assert off.encode("s", "a test") == '"s"'
    assert off.decode(codec(OLD).encode("s", "a test")) == "s"


def test_what_is_no_secret_stays_plain() -> None:
    assert codec(OLD).encode(["id"], "a test", secret=False) == '["id"]'


def test_the_limit_counts_before_encryption() -> None:
    small = Codec(max_bytes=1024, keyring=Keyring([OLD]))
    assert small.decode(small.encode("x" * 1022, "a test")) == "x" * 1022
    with pytest.raises(PayloadError, match="it is 1025 bytes as JSON"):
        small.encode("x" * 1023, "a test")


def test_a_key_that_is_missing_is_named() -> None:
    text = codec(OLD).encode("s", "a test")
    for reader in (Codec(), codec(NEW)):
        with pytest.raises(EncryptionError, match=f"encrypted with the key {name_of(OLD)}"):
            reader.decode(text)


def test_what_was_changed_is_refused() -> None:
    stored = json.loads(codec(OLD).encode("s", "a test"))
    token = stored["__value__"]
    stored["__value__"] = token[:20] + ("A" if token[20] != "A" else "B") + token[21:]
    with pytest.raises(EncryptionError, match="it was changed"):
        codec(OLD).decode(json.dumps(stored))


def test_a_failure_is_encrypted_once_and_comes_back() -> None:
    text = encode_failure(KeyError("hunter2"), codec(OLD), trusted_packages=())
    assert "hunter2" not in text
    again = decode_failure(text, codec(OLD))
    assert (type(again), again.args) == (KeyError, ("hunter2",))
    with pytest.raises(EncryptionError):  # and no failure without a message
        decode_failure(text, Codec())


# --- settings


def settings(given: Any, environ: dict[str, str] | None = None) -> Settings:
    keywords = {} if given is None else {"encryption_keys": given}
    return load_settings(Celery(set_as_current=False), keywords, environ or {})


def test_keys_come_as_a_list_or_as_text() -> None:
    assert settings([NEW, OLD]).encryption_keys == (NEW, OLD)
    assert settings([NEW.encode()]).encryption_keys == (NEW,)
    environ = {"DURABLE_ENCRYPTION_KEYS": f"{NEW}, {OLD}"}
    assert settings(None, environ).encryption_keys == (NEW, OLD)


@pytest.mark.parametrize(
    "wrong", ["hunter2", [NEW, "hunter2"], ["hunter2" * 9], [7], 7, [NEW[:-4]]]
)
def test_a_wrong_key_is_refused_and_not_shown(wrong: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        settings(wrong)
    assert "keyword encryption_keys of Durable() is ***; accepted: list of Fernet keys" in str(
        caught.value
    )
    assert "hunter2" not in str(caught.value)
    assert NEW[:10] not in str(caught.value)


def test_keys_never_show() -> None:
    loaded = settings([NEW, OLD])
    app = Celery("keys", broker="memory://", set_as_current=False)
    app.conf.durable_encryption_keys = [NEW, OLD]
    durable = Durable(app)
    shown = [
        repr(loaded),
        f"{loaded.encryption_keys!r} {loaded.encryption_keys}",
        repr(vars(loaded)),
        repr(durable.codec.keyring),
        app.conf.humanize(),  # `celery report`
        str(app.conf.table()),  # `celery inspect conf`
    ]
    assert not [text for text in shown if NEW in text or OLD in text]


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    with pytest.raises(ConfigurationError) as caught:
        Keyring([OLD])
    assert str(caught.value) == (
        "durable_encryption_keys is set, and the package cryptography is not installed:"
        ' pip install "celery-durable[encryption]"'
    )
