-- A new PostgreSQL server has the account of the registry and its two databases. Run once, by PostgreSQL's administrator.
\set password `cat "${SECRETS_FOLDER:-/run/secrets}/PGPASSWORD"`
CREATE ROLE mlflow LOGIN PASSWORD :'password';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE accounts OWNER mlflow;
REVOKE ALL ON DATABASE mlflow, accounts FROM PUBLIC;
