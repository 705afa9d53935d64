"""A bucket store in memory that speaks as much of Google's JSON API as tensorstore and fsspec use.

`ObjectStore` serves it, `use` points this process at a server: tensorstore by its environment
variable; epath by way of gcsfs where that is installed, or else of the small file system below.
"""

import http.server
import importlib.util
import json
import os
import re
import sys
import threading
import types
import urllib.error
import urllib.parse
import urllib.request

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class ObjectStore:
    """Serves `objects`, whole values by "bucket/key"; use as a context manager."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.versions: dict[str, int] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.refuse = lambda method, name: False  # the tests' way to break it
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def environment(self):
        """What a process needs to find this store."""
        return {"TENSORSTORE_GCS_HTTP_URL": self.url, "STORAGE_EMULATOR_HOST": self.url,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *words):
        del words

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_DELETE(self):
        self._answer("DELETE")

    def _answer(self, method):
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?",
                             parts.path)
        if not found:
            return self._send(404, b"{}")
        upload, bucket, key = found.groups()
        key = urllib.parse.unquote(key) if key else query.get("name")
        with self.store.lock:
            self.store.requests.append(f"{method} {bucket}/{key or ''}")
            if self.store.refuse(method, f"{bucket}/{key}"):
                return self._send(403, b'{"error": {"code": 403, "message": "refused"}}')
            if method == "POST" and upload:
                return self._put(bucket, key, query, body)
            if method == "DELETE":
                return self._delete(f"{bucket}/{key}")
            if key:
                return self._get(bucket, key, query)
            if parts.path.endswith("/o"):
                return self._list(bucket, query)
            return self._send_json(200, {"name": bucket, "kind": "storage#bucket"})

    def _put(self, bucket, key, query, body):
        if query.get("uploadType") == "resumable":
            return self._put_part(bucket, key or json.loads(body)["name"], query, body)
        if query.get("uploadType") == "multipart":
            kind = self.headers["Content-Type"]
            boundary = re.search(r"boundary=['\"]?([^'\"]+)", kind)[1].encode()
            _, about, body, _ = body.split(b"--" + boundary)  # lines end as gcsfs ends them
            key = json.loads(about.split(b"\n\n", 1)[1])["name"]
            body = body.split(b"\n\n", 1)[1].removesuffix(b"\n")
        name = f"{bucket}/{key}"
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != self.store.versions.get(name, 0):
            return self._send_json(412, {"error": {"code": 412, "message": "generation"}})
        self.store.objects[name] = body
        self.store.versions[name] = max(self.store.versions.values(), default=0) + 1
        return self._send_json(200, self._about(bucket, key))

    def _put_part(self, bucket, key, query, body):
        """Begins an upload in parts, or takes a part; the last one makes the object."""
        name = f"{bucket}/{key}"
        if "upload_id" not in query:
            self.store.uploads[name] = b""
            place = urllib.parse.urlencode(
                {"uploadType": "resumable", "upload_id": "1", "name": key})
            return self._send(200, b"", {
                "Location": f"{self.store.url}/upload/storage/v1/b/{bucket}/o?{place}"})
        self.store.uploads[name] += body
        whole = self.store.uploads[name]
        if self.headers["Content-Range"].endswith(f"/{len(whole)}"):
            return self._put(bucket, key, {}, self.store.uploads.pop(name))
        return self._send(308, b"", {"Range": f"bytes=0-{len(whole) - 1}"})

    def _delete(self, name):
        if self.store.objects.pop(name, None) is None:
            return self._send_json(404, {"error": {"code": 404, "message": "not found"}})
        self.store.versions[name] = 0
        return self._send(204, b"")

    def _get(self, bucket, key, query):
        name = f"{bucket}/{key}"
        if name not in self.store.objects:
            return self._send_json(404, {"error": {"code": 404, "message": "not found"}})
        if query.get("alt") != "media":
            return self._send_json(200, self._about(bucket, key))
        version = self.store.versions[name]
        if query.get("ifGenerationNotMatch") == str(version):
            return self._send(304, b"")
        data, headers = self.store.objects[name], {"x-goog-generation": str(version)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._send(200, data, headers)
        first, last = wanted.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data) > 0:
            return self._send(416, b"", headers)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._send(206, data[start:stop], headers)

    def _list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first, last = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], set()
        for name in sorted(self.store.objects):
            key = name.removeprefix(f"{bucket}/")
            if (name == key or not key.startswith(prefix) or key < first
                    or (last and key >= last)):
                continue
            if delimiter and delimiter in key[len(prefix):]:
                prefixes.add(prefix + key[len(prefix):].split(delimiter)[0] + delimiter)
            else:
                items.append(self._about(bucket, key))
        return self._send_json(200, {"items": items, "prefixes": sorted(prefixes)})

    def _about(self, bucket, key):
        name = f"{bucket}/{key}"
        version = str(self.store.versions[name])
        return {"kind": "storage#object", "name": key, "bucket": bucket, "generation": version,
                "metageneration": "1", "size": str(len(self.store.objects[name])),
                "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z"}

    def _send_json(self, status, values):
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _send(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Files(AbstractFileSystem):
    """gs:// for fsspec, where gcsfs is not installed; like it without folders and appending."""

    protocol = ("gs", "gcs")
    cachable = False

    def __init__(self, **options):
        super().__init__()
        del options

    @property
    def url(self):
        """Of the store of today: etils keeps one file system for all."""
        return os.environ["STORAGE_EMULATOR_HOST"]

    def _open(self, path, mode="rb", **options):
        del options
        if mode not in ("rb", "wb"):
            raise NotImplementedError(f"mode {mode!r}")
        return _File(self, path, mode, cache_type="all" if mode == "rb" else "none")

    def info(self, path, **options):
        del options
        bucket, _, key = self._strip_protocol(path).partition("/")
        if key and (about := self._call("GET", _object(bucket, key))):
            return _info(json.loads(about))
        if not key or self._listed(bucket, f"{key}/")[1:] != ([], []):
            return {"name": self._strip_protocol(path), "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **options):
        del options
        bucket, _, key = self._strip_protocol(path).partition("/")
        _, items, folders = self._listed(bucket, f"{key}/" if key else "")
        if not items and not folders and key:
            items = [self.info(path)]
        found = items + [{"name": f"{bucket}/{folder.rstrip('/')}", "size": 0, "type": "directory"}
                         for folder in folders]
        return found if detail else [item["name"] for item in found]

    def rm_file(self, path):
        bucket, _, key = self._strip_protocol(path).partition("/")
        if self._call("DELETE", _object(bucket, key)) is None:
            raise FileNotFoundError(path)

    _rm = rm_file

    def rm(self, path, recursive=False, maxdepth=None):
        del maxdepth
        for each in self.find(path) if recursive else [path]:  # folders are not there
            self.rm_file(each)

    def cp_file(self, path1, path2, **options):
        del options
        self.pipe_file(path2, self.cat_file(path1))

    def mkdir(self, path, create_parents=True, **options):
        del path, create_parents, options

    def makedirs(self, path, exist_ok=False):
        del path, exist_ok

    def rmdir(self, path):
        del path

    def _listed(self, bucket, prefix):
        query = urllib.parse.urlencode({"prefix": prefix, "delimiter": "/"})
        found = json.loads(self._call("GET", f"/storage/v1/b/{bucket}/o?{query}"))
        return found, [_info(item) for item in found["items"]], found["prefixes"]

    def _call(self, method, target, data=None):
        request = urllib.request.Request(self.url + target, data, method=method)
        try:
            with urllib.request.urlopen(request) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            with error:  # it holds the connection
                if error.code == 404:
                    return None
                raise OSError(f"the store answers {error.code}") from error


class _File(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        bucket, _, key = self.path.partition("/")
        data = self.fs._call("GET", f"{_object(bucket, key)}?alt=media")
        if data is None:
            raise FileNotFoundError(self.path)
        return data[start:end]

    def _initiate_upload(self):
        self.whole = b""

    def _upload_chunk(self, final=False):
        self.whole += self.buffer.getvalue()
        if final:
            bucket, _, key = self.path.partition("/")
            query = urllib.parse.urlencode({"uploadType": "media", "name": key})
            self.fs._call("POST", f"/upload/storage/v1/b/{bucket}/o?{query}", self.whole)
        return True


def _object(bucket, key):
    return f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(key, safe='')}"


def _info(about):
    return {"name": f"{about['bucket']}/{about['name']}", "size": int(about["size"]),
            "type": "file", "generation": about["generation"]}


def use(patch=None):
    """Let gs:// in this process mean the store that the environment names.

    Args:
      patch: pytest's monkeypatch, to undo it; for good without.
    """
    if importlib.util.find_spec("gcsfs"):
        return
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, _Files, clobber=True)
    bucket = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    storage = types.ModuleType("google.cloud.storage")  # Orbax asks it for this one field
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: bucket)
    cloud = types.ModuleType("google.cloud")
    cloud.storage = storage
    for module in (cloud, storage):
        if patch:
            patch.setitem(sys.modules, module.__name__, module)
        sys.modules[module.__name__] = module
