"""Keys that pg_dump writes as one statement, in two steps. That servers make the same of both is tried in tests/integration."""

from __future__ import annotations

import pytest

from live_migration.coordinator.two_step_constraints import split_key


@pytest.mark.parametrize(
    ("statement", "build", "adopt"),
    [
        (
            "ALTER TABLE ONLY s.t\n    ADD CONSTRAINT t_pkey PRIMARY KEY (id, k2);",
            "CREATE UNIQUE INDEX t_pkey ON s.t USING btree (id, k2)",
            "ALTER TABLE ONLY s.t ADD CONSTRAINT t_pkey PRIMARY KEY USING INDEX t_pkey;",
        ),
        (
            (
                "ALTER TABLE ONLY s.t\n    ADD CONSTRAINT k UNIQUE NULLS NOT DISTINCT (a) INCLUDE (b, c)"
                " WITH (fillfactor='70', deduplicate_items='off') DEFERRABLE INITIALLY DEFERRED;"
            ),
            "CREATE UNIQUE INDEX k ON s.t USING btree (a) INCLUDE (b, c) NULLS NOT DISTINCT WITH (fillfactor='70', deduplicate_items='off')",
            "ALTER TABLE ONLY s.t ADD CONSTRAINT k UNIQUE USING INDEX k DEFERRABLE INITIALLY DEFERRED;",
        ),
        (
            (
                'ALTER TABLE ONLY "a; b"."c) d"\n    ADD CONSTRAINT "e "" PRIMARY KEY (f" PRIMARY KEY ("g, ""h", "I") DEFERRABLE;\n\n'
                'ALTER TABLE "a; b"."c) d" CLUSTER ON "e "" PRIMARY KEY (f";'
            ),
            'CREATE UNIQUE INDEX "e "" PRIMARY KEY (f" ON "a; b"."c) d" USING btree ("g, ""h", "I")',
            (
                'ALTER TABLE ONLY "a; b"."c) d" ADD CONSTRAINT "e "" PRIMARY KEY (f" PRIMARY KEY USING INDEX "e "" PRIMARY KEY (f" DEFERRABLE;\n\n'
                'ALTER TABLE "a; b"."c) d" CLUSTER ON "e "" PRIMARY KEY (f";'
            ),
        ),
        (
            "ALTER TABLE s.t ADD CONSTRAINT k UNIQUE (a)",
            "CREATE UNIQUE INDEX k ON s.t USING btree (a)",
            "ALTER TABLE s.t ADD CONSTRAINT k UNIQUE USING INDEX k",
        ),
    ],
)
def test_a_key_is_its_index_and_then_the_constraint(statement: str, build: str, adopt: str) -> None:
    assert split_key(statement) == (build, adopt)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE UNIQUE INDEX k ON s.t USING btree (a);",
        "ALTER TABLE ONLY s.t\n    ADD CONSTRAINT x EXCLUDE USING gist (a WITH =);",
        "ALTER TABLE ONLY s.t\n    ADD CONSTRAINT k PRIMARY KEY (id, during WITHOUT OVERLAPS);",
        "ALTER TABLE ONLY s.t\n    ADD CONSTRAINT k UNIQUE (id) WITH (a=(1));",
        "ALTER TABLE ONLY s.t\n    ADD CONSTRAINT k UNIQUE (id) NOT ENFORCED;",
        "ALTER TABLE ONLY s.t\n    ADD CONSTRAINT k UNIQUE USING INDEX k;",
        "ALTER TABLE ONLY s.t\n    ADD CONSTRAINT c CHECK ((a > 0));",
        "ALTER TABLE ONLY s.t\n    ADD CONSTRAINT k FOREIGN KEY (a) REFERENCES s.u(a);",
        "SELECT 1;\nALTER TABLE ONLY s.t ADD CONSTRAINT k UNIQUE (id);",
    ],
)
def test_all_else_is_made_in_one(statement: str) -> None:
    assert split_key(statement) is None
