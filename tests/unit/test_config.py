"""Where settings come from, which source wins, and what a wrong one says."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from celery import Celery

from durable import config
from durable.config import FIELDS, Settings, load_settings
from durable.errors import ConfigurationError

Given = Mapping[str, object]

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture
def app() -> Celery:
    return Celery("shop", set_as_current=False)


def load(
    app: Celery, keywords: Given | None = None, environ: dict[str, str] | None = None
) -> Settings:
    return load_settings(app, keywords or {}, environ or {})


def refusal(
    app: Celery, keywords: Given | None = None, environ: dict[str, str] | None = None
) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(app, keywords, environ)
    return str(caught.value)


class LikeDjango:
    """A settings object as Django's: upper case, other people's keys, some that raise."""

    CELERY_DURABLE_LEASE = "30s"
    CELERY_DURABLE_DATABASE_URL = "postgresql://db/shop"
    CELERY_TASK_DEFAULT_QUEUE = "django"
    DURABLE_DATABASE_URL = "the site's own, read by nobody but the site"
    DURABLE_FOO = 1

    @property
    def LOGOUT_URL(self) -> str:  # noqa: N802 - Django's name
        raise AssertionError("a setting of somebody else was read")


class TestWhereSettingsComeFrom:
    def test_nothing_set_gives_the_defaults(self, app: Celery) -> None:
        assert load(app) == Settings()

    def test_app_conf_wins_over_environment_over_keyword(self, app: Celery) -> None:
        keywords = {"lease": 20, "pool_size": 8, "dispatch_batch": 7}
        environ = {"DURABLE_LEASE": "40s", "DURABLE_POOL_SIZE": "6"}
        app.conf.durable_lease = 30
        settings = load(app, keywords, environ)
        assert (settings.lease, settings.pool_size, settings.dispatch_batch) == (30.0, 6, 7)

    def test_conf_update_before_and_after_the_configuration_was_read(self, app: Celery) -> None:
        app.conf.update(durable_lease=30)
        assert app.conf.task_default_queue == "celery"
        app.conf.update(durable_pool_size=9)
        settings = load(app)
        assert (settings.lease, settings.pool_size) == (30.0, 9)

    @pytest.mark.parametrize("given_as", ["name", "object"])
    def test_config_module(
        self, app: Celery, given_as: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = ModuleType("shop_celeryconfig")
        vars(module).update(durable_lease=timedelta(seconds=30), task_default_queue="shop")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        app.config_from_object(module.__name__ if given_as == "name" else module)
        assert load(app).lease == 30.0

    def test_config_dict(self, app: Celery) -> None:
        app.config_from_object({"durable_lease": 30, "durable_listen": False})
        settings = load(app)
        assert (settings.lease, settings.listen) == (30.0, False)

    def test_django_namespace(self, app: Celery) -> None:
        app.config_from_object(LikeDjango(), namespace="CELERY")
        settings = load(app)
        assert settings.lease == 30.0
        assert settings.database_url == "postgresql://db/shop"

    def test_conf_update_wins_over_django_where_celerys_own_settings_do(self, app: Celery) -> None:
        app.config_from_object(LikeDjango(), namespace="CELERY")
        app.conf.update(durable_lease=40, task_default_queue="updated")
        updated = app.conf.task_default_queue == "updated"  # not so in Celery 5.5
        assert load(app).lease == (40.0 if updated else 30.0)

    def test_lower_case_namespace(self, app: Celery) -> None:
        app.config_from_object({"celery_durable_lease": 30}, namespace="celery")
        assert load(app).lease == 30.0

    def test_none_and_empty_text_mean_not_set(self, app: Celery) -> None:
        app.conf.durable_database_url = None
        environ = {"DURABLE_DATABASE_URL": " "}
        assert load(app, {"database_url": "embedded"}, environ).database_url == "embedded"

    def test_none_is_a_value_of_prepare_threshold(self, app: Celery) -> None:
        app.conf.durable_prepare_threshold = None
        assert load(app, {"prepare_threshold": 3}).prepare_threshold is None

    def test_settings_are_frozen(self) -> None:
        with pytest.raises(FrozenInstanceError):
            Settings().lease = 3  # type: ignore[misc]


class TestReading:
    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("lease", "15", 15.0),
            ("lease", "2m", 120.0),
            ("result_poll_max", "0.5", 0.5),
            ("pool_size", "8", 8),
            ("prepare_threshold", "0", None),
            ("prepare_threshold", "none", None),
            ("listen", "off", False),
            ("listen", "True", True),
            ("exception_modules", "shop.errors, stripe", ("shop.errors", "stripe")),
            ("embedded_dir", "/var/lib/durable", "/var/lib/durable"),
        ],
    )
    def test_environment_text(self, app: Celery, name: str, text: str, expected: object) -> None:
        settings = load(app, environ={f"DURABLE_{name.upper()}": text})
        assert getattr(settings, name) == expected

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("lease", timedelta(minutes=1), 60.0),
            ("lease", 2.5, 2.5),
            ("exception_modules", ["shop.errors"], ("shop.errors",)),
            ("embedded_dir", Path("data"), "data"),
            ("prepare_threshold", 0, None),
            ("prepare_threshold", 7, 7),
        ],
    )
    def test_native_values(self, app: Celery, name: str, value: object, expected: object) -> None:
        assert getattr(load(app, {name: value}), name) == expected

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("embedded", "embedded"),
            ("postgresql://u:p@db/shop", "postgresql://u:p@db/shop"),
            ("postgres://db/shop", "postgresql://db/shop"),
            ("postgresql+psycopg://db/shop", "postgresql://db/shop"),
            ("host=db dbname=shop", "host=db dbname=shop"),
            ("password=a://b host=db", "password=a://b host=db"),
        ],
    )
    def test_database_urls(self, app: Celery, given: str, expected: object) -> None:
        assert load(app, {"database_url": given}).require_database_url() == expected

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("lease", True),
            ("lease", "1s"),
            ("lease", 601),
            ("lease", "soon"),
            ("lease", float("nan")),
            ("lease", float("inf")),
            ("lease", []),
            ("listen", 1),
            ("listen", "perhaps"),
            ("pool_size", 0),
            ("pool_size", True),
            ("pool_size", 2.5),
            ("pool_size", "many"),
            ("prepare_threshold", -1),
            ("namespace", ""),
            ("namespace", "x" * 64),
            ("namespace", "a\nb"),
            ("namespace", 7),
            ("embedded_dir", ""),
            ("embedded_dir", 3),
            ("exception_modules", "not a module"),
            ("exception_modules", [3]),
            ("exception_modules", {"shop"}),
            ("database_url", "shop"),
            ("database_url", 3),
        ],
    )
    def test_refused_values_name_setting_value_and_what_is_accepted(
        self, app: Celery, name: str, value: object
    ) -> None:
        accepts = FIELDS[name].metadata["kind"].accepts
        text = refusal(app, {name: value})
        assert f"keyword {name} of Durable() is {value!r}; accepted: {accepts}" in text


class TestFollowersAndConflicts:
    def test_unset_heartbeat_follows_a_short_lease(self, app: Celery) -> None:
        assert load(app, {"lease": 4}).heartbeat_interval == 1.0
        assert load(app, {"lease": 60}).heartbeat_interval == 2.5

    def test_heartbeat_over_a_third_of_the_lease(self, app: Celery) -> None:
        app.conf.durable_heartbeat_interval = 4
        assert refusal(app) == (
            "durable_heartbeat_interval in app.conf (4 s) must be at most a third of "
            "the default of durable_lease (10 s)"
        )

    def test_ring_interval_under_poll_interval(self, app: Celery) -> None:
        text = refusal(app, {"ring_interval": 3}, {"DURABLE_POLL_INTERVAL": "5"})
        assert text == (
            "keyword ring_interval of Durable() (3 s) must be at least "
            "environment variable DURABLE_POLL_INTERVAL (5 s)"
        )


class TestUnknownSettings:
    def test_in_app_conf(self, app: Celery) -> None:
        app.conf.durable_leese = 3
        assert refusal(app) == (
            "durable_leese in app.conf is not a setting; did you mean durable_lease?"
        )

    def test_in_django_settings(self, app: Celery) -> None:
        app.config_from_object({"CELERY_DURABLE_LEESE": 3}, namespace="CELERY")
        assert refusal(app) == (
            "CELERY_DURABLE_LEESE in app.conf is not a setting; did you mean CELERY_DURABLE_LEASE?"
        )

    def test_keyword(self, app: Celery) -> None:
        text = refusal(app, {"durable_lease": 3})
        assert text == ("keyword durable_lease of Durable() is not a setting; did you mean lease?")

    def test_without_a_likeness_says_where_the_list_is(self, app: Celery) -> None:
        app.conf.durable_zzz = 3
        assert "`python -m durable.config` lists them all" in refusal(app)

    def test_environment_close_to_a_setting(self, app: Celery) -> None:
        assert refusal(app, environ={"DURABLE_DATABASE_ULR": "x"}) == (
            "environment variable DURABLE_DATABASE_ULR is not a setting; "
            "did you mean DURABLE_DATABASE_URL?"
        )

    @pytest.mark.parametrize(
        "variable",
        [
            "DURABLE_OBJECTS_NAMESPACE",
            "DURABLE_DATABASE_URL_REPLICA",
            "DURABLE_TEST_DATABASE_URL",
            "DURABLE_TEST_LEASE",
            "NOT_DURABLE_LEASE",
        ],
    )
    def test_environment_of_somebody_else_is_left_alone(self, app: Celery, variable: str) -> None:
        assert load(app, environ={variable: "x"}) == Settings()

    @pytest.mark.parametrize("key", ["DURABLE_LEASE", "CELERY_DURABLE_LEASE", "durable_Lease"])
    def test_a_spelling_that_celery_does_not_read(self, app: Celery, key: str) -> None:
        app.config_from_object({key: 3})
        assert refusal(app) == f"{key} in app.conf is not read: write durable_lease"

    def test_mixed_case_under_a_namespace(self, app: Celery) -> None:
        app.config_from_object({"CELERY_durable_lease": 3}, namespace="CELERY")
        assert refusal(app).endswith("is not read: write CELERY_DURABLE_LEASE")

    def test_all_problems_are_told_at_once(self, app: Celery) -> None:
        app.conf.update(durable_leese=3, durable_pool_size=0)
        assert len(refusal(app, {"ease": 1}, {"DURABLE_LISTEN": "?"}).splitlines()) == 4


class TestDatabaseUrlErrors:
    def test_no_database_names_both_ways_and_embedded(self) -> None:
        with pytest.raises(ConfigurationError) as caught:
            Settings().require_database_url()
        for name in ("durable_database_url", "DURABLE_DATABASE_URL", "'embedded'"):
            assert name in str(caught.value)

    def test_another_database(self, app: Celery) -> None:
        text = refusal(app, {"database_url": "mysql://root:hunter2@db/shop"})
        assert "runs are kept in Postgres; mysql:// is something else" in text
        assert "mysql://root:***@db/shop" in text

    def test_another_driver(self, app: Celery) -> None:
        text = refusal(app, {"database_url": "postgresql+asyncpg://db/shop"})
        assert "write postgresql:// instead of postgresql+asyncpg://" in text

    @pytest.mark.parametrize(
        "value",
        [
            "mysql://root:hunter2@db/shop",
            "mysql://root:hun/ter@hunter2@db/shop",
            "mysql://db/shop?password=hunter2&x=1",
            "; password = 'x hunter2' host=db",
            "; password=hunter2",
            "; password='hunter2",
            ("postgresql://root:hunter2@db/shop",),
        ],
    )
    def test_passwords_are_masked(self, app: Celery, value: object) -> None:
        text = refusal(app, {"database_url": value})
        assert "***" in text
        assert "hunter2" not in text


class TestLazyConfiguration:
    def test_importing_the_module_reads_no_configuration(self, app: Celery) -> None:
        app.config_from_object("no_such_module_yet")
        app.conf.durable_lease = 30  # does not load it either
        assert not app.configured

    def test_a_plain_mapping_will_do(self) -> None:
        app = SimpleNamespace(conf={"durable_lease": 3, "other": 1, 7: 1}, namespace=None)
        assert load(app).lease == 3.0


class TestDocumentation:
    def test_every_setting_says_what_it_means_in_one_sentence(self) -> None:
        for name, each in FIELDS.items():
            meaning = each.metadata["meaning"]
            assert meaning[0].isupper(), name
            assert meaning.endswith("."), name

    def test_defaults_are_accepted_by_their_own_setting(self, app: Celery) -> None:
        for name, each in FIELDS.items():
            assert getattr(load(app, {name: each.default}), name) == each.default

    def test_the_table_in_the_docs_is_up_to_date(self) -> None:
        text = DOCS.read_text(encoding="utf-8")
        _, start, rest = text.partition("<!-- settings: python -m durable.config -->\n")
        shown, end, _ = rest.partition("\n<!-- end of settings -->")
        assert start, "the marker is missing"
        assert end, "the end marker is missing"
        assert shown.strip() == config.table(), "paste the output of: python -m durable.config"
