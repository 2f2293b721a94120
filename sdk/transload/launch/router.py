"""One address for several engines: an nginx configuration with weights from the plan."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from transload.launch.setting import Setting
from transload.launch.topology import Instance
from transload.launch.words import commented, engine_words, header

FILE = "router/nginx.conf"
PORT = 8080
IMAGE = "nginx:1.28"
MOST_WEIGHT = 100


def files(setting: Setting) -> dict[str, str]:
    """router/nginx.conf when the plan has more than one engine."""
    if len(setting.instances) < 2:
        return {}
    return {FILE: config(setting)}


def weights(instances: Sequence[Instance]) -> list[int]:
    """Whole weights in the proportion of the plan's shares: the largest is at most MOST_WEIGHT, none is 0."""
    shares = [i.plan.router_weight / i.plan.replicas for i in instances]
    most = max(shares)
    if most <= 0:
        return [1] * len(shares)
    whole = [max(1, round(share / most * MOST_WEIGHT)) for share in shares]
    common = gcd(*whole)
    return [w // common for w in whole]


def config(setting: Setting) -> str:
    """The configuration for engines on their nodes."""
    site = setting.site
    servers = [
        (f"{_host(site.address(i.head))}:{site.port + i.slot}", weight, engine_words(i))
        for i, weight in zip(setting.instances, weights(setting.instances), strict=True)
    ]
    about = [
        *header(setting.plan, f"Routes port {PORT} to {len(servers)} engines: nginx -c THIS_FILE"),
        "Weights are the engines' shares of the predicted throughput; least_conn sends a request where the fewest are",
        "open for its weight. An engine that does not answer is left out for 10 seconds.",
    ]
    return commented(about) + "\n" + text(servers)


def text(servers: Sequence[tuple[str, int, str]]) -> str:
    """nginx's configuration for (address, weight, comment) of every engine."""
    lines = "".join(
        f"    # {about}\n    server {address} weight={weight} max_fails=2 fail_timeout=10s;\n"
        for address, weight, about in servers
    )
    return _TEMPLATE.replace("@SERVERS@", lines.rstrip("\n")).replace("@PORT@", str(PORT))


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


_TEMPLATE = """\
worker_processes auto;
worker_rlimit_nofile 16384;
error_log /dev/stderr warn;
pid /tmp/transload-router.pid;

events {
  worker_connections 8192;
}

http {
  access_log off;
  client_body_temp_path /tmp/transload-router-body;
  proxy_temp_path /tmp/transload-router-proxy;
  fastcgi_temp_path /tmp/transload-router-fastcgi;
  uwsgi_temp_path /tmp/transload-router-uwsgi;
  scgi_temp_path /tmp/transload-router-scgi;

  upstream engines {
    least_conn;
@SERVERS@
    keepalive 64;
  }

  server {
    listen @PORT@;
    client_max_body_size 64m;

    # The router itself; an engine's own health is at its own port.
    location = /router/health {
      return 200 "ok\\n";
    }

    location / {
      proxy_pass http://engines;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;

      # Tokens are passed on as they come, and an answer may take long.
      proxy_buffering off;
      proxy_connect_timeout 5s;
      proxy_read_timeout 3600s;
      proxy_send_timeout 3600s;

      # Requests are POSTs: another engine gets one only when it could not be sent to the first.
      proxy_next_upstream error timeout http_503;
      proxy_next_upstream_tries 3;
    }
  }
}
"""
