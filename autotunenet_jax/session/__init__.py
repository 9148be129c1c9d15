"""The host side of one run, whatever the framework: it carries out directives and keeps the record."""
