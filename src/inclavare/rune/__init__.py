"""The OCI front-end.

``main`` decides whether a call concerns an enclave; an ordinary container is handed to crun or runc by ``execve`` with
next to nothing imported (``tests/unit/rune/test_hot_path.py`` holds the list). Everything else is in ``enclave`` and
the small files beside it, and is imported only for enclave containers.
"""
