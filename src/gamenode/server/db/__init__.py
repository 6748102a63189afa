"""The database: group commit, tables, migrations."""
