"""A node: its addresses, its containerd, its kubelet. Node 1 is the machine itself, node 2 a network namespace on it.

    pods of node 1 -- hs-k0 198.18.0.1 (the machine: API server, name server)
                        |
                      hs-u0 ===== hs-u1 198.18.0.2 (node 2) -- hs-k1 198.18.1.1 -- pods of node 2

Nothing of it is routed beyond the machine. Images are only those imported: a pull ends at a closed port of loopback.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.control import DOMAIN, HOST, PODS, Files
from tests.cluster.host import BRIDGES, NAMESPACE, STATE, UPLINKS, Ledger, call, make_cgroup, wait_for

PAUSE = "localhost/hotstage-pause:1"
CNI = "/usr/lib/cni"
REACH = "198.18.0.0/15"


@dataclass(frozen=True)
class Node:
    """One of the two; ``inside`` is what a program is prefixed with to run in the node's network."""

    name: str
    number: int
    address: str
    bridge: str
    subnet: str
    first: str  # of the addresses for pods
    gateway: str

    @property
    def inside(self) -> tuple[str, ...]:
        # `ip netns exec` would mount /sys anew and hide the cgroups
        return () if self.number == 1 else ("nsenter", f"--net=/run/netns/{NAMESPACE}")

    @property
    def state(self) -> Path:
        return STATE / self.name  # short: sockets lie here

    @property
    def socket(self) -> str:
        return str(self.state / "containerd.sock")

    def ctr(self, *args: str, seconds: float = 300) -> str:
        return call("ctr", "--address", self.socket, "--namespace", "k8s.io", *args, seconds=seconds)


NODES = (
    Node("node1", 1, HOST, BRIDGES[0], "198.18.0.0/24", "198.18.0.16", HOST),
    Node("node2", 2, "198.18.0.2", BRIDGES[1], "198.18.1.0/24", "198.18.1.16", "198.18.1.1"),
)


def make_network(ledger: Ledger) -> None:
    """Bridges, the second node's namespace, and the routes between them."""
    ip = functools.partial(call, "ip")
    there = functools.partial(call, *NODES[1].inside, "ip")
    # addresses of their own: a bridge without one takes the lowest of its ports', and with each pod that comes or goes
    # its neighbours would send to one that is no more, for half a minute
    ip("link", "add", BRIDGES[0], "address", "02:68:73:00:00:01", "type", "bridge")
    ip("address", "add", f"{HOST}/24", "dev", BRIDGES[0])
    ip("link", "set", BRIDGES[0], "up")
    ip("netns", "add", NAMESPACE)
    ip("link", "add", UPLINKS[0], "type", "veth", "peer", "name", UPLINKS[1], "netns", NAMESPACE)
    ip("link", "set", UPLINKS[0], "master", BRIDGES[0], "up")
    there("link", "set", "lo", "up")
    there("link", "add", BRIDGES[1], "address", "02:68:73:00:00:02", "type", "bridge")
    there("address", "add", f"{NODES[1].gateway}/24", "dev", BRIDGES[1])
    there("link", "set", BRIDGES[1], "up")
    there("address", "add", f"{NODES[1].address}/24", "dev", UPLINKS[1])
    there("link", "set", UPLINKS[1], "up")
    there("route", "add", "default", "via", HOST)
    ip("route", "add", NODES[1].subnet, "via", NODES[1].address)
    # an answer from a pod beside the one that asked for a service must pass where the service's address was changed
    settings = {"net.ipv4.ip_forward": "1", "net.bridge.bridge-nf-call-iptables": "1"}
    if not Path("/proc/sys/net/bridge").exists():
        call("modprobe", "br_netfilter")
    for key, value in settings.items():
        call(*NODES[1].inside, "sysctl", "-q", "-w", f"{key}={value}")
        ledger.sysctl(key, value)
    if "-P FORWARD DROP" in call("iptables", "-w", "-S", "FORWARD", check=False):  # a Docker engine sets it
        for side in ("-s", "-d"):
            rule = [side, REACH, "-j", "ACCEPT"]
            ledger.rules.append(rule)
            ledger.save()
            call("iptables", "-w", "-I", "FORWARD", *rule)


def start_containerd(ledger: Ledger, node: Node) -> None:
    """Returns when it answers."""
    home = ledger.scratch / node.name
    networks, hosts = home / "cni", home / "hosts" / "_default"
    for folder in (networks, hosts, node.state):
        folder.mkdir(parents=True)
    (hosts / "hosts.toml").write_text('server = "http://127.0.0.1:9"\n')
    (networks / "10-bridge.conflist").write_text(
        json.dumps(
            {
                "cniVersion": "0.4.0",
                "name": node.name,
                "plugins": [
                    {
                        "type": "bridge",
                        "bridge": node.bridge,
                        "isGateway": True,
                        "ipMasq": False,
                        "ipam": {
                            "type": "host-local",
                            "dataDir": str(home / "addresses"),
                            "ranges": [[{"subnet": node.subnet, "rangeStart": node.first, "gateway": node.gateway}]],
                            "routes": [{"dst": "0.0.0.0/0"}],
                        },
                    }
                ],
            }
        )
    )
    disabled = ["snapshotter.v1.aufs", "snapshotter.v1.btrfs", "snapshotter.v1.devmapper", "snapshotter.v1.zfs"]
    config = home / "containerd.toml"
    config.write_text(
        f"""
version = 2
root = "{home}/containerd"
state = "{node.state}/containerd"
disabled_plugins = [{", ".join(f'"io.containerd.{name}"' for name in disabled)}]
[grpc]
  address = "{node.socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{home}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  # lowering a process's OOM score is not permitted everywhere, and without this every sandbox fails there
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI}"
    conf_dir = "{networks}"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{home}/hosts"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      Root = "{node.state}/runc"
      SystemdCgroup = false
"""
    )
    name = f"containerd-{node.name}"
    ledger.start(name, [*node.inside, "containerd", "--config", str(config), "--log-level", "warn"])

    def answers() -> bool:
        return "SERVER" in call("ctr", "--address", node.socket, "--timeout", "2s", "version", check=False).upper()

    wait_for(answers, name, 60, lambda: ledger.tail(name))


def start_kubelet(ledger: Ledger, kube: Path, files: Files, node: Node) -> None:
    """Returns at once; the node is Ready some seconds later."""
    make_cgroup(f"hotstage-{node.name}")
    home = ledger.scratch / node.name
    resolve = home / "resolv.conf"
    resolve.write_text(f"nameserver {HOST}\n")
    config = home / "kubelet.json"
    config.write_text(
        json.dumps(
            {
                "apiVersion": "kubelet.config.k8s.io/v1beta1",
                "kind": "KubeletConfiguration",
                "address": node.address,
                "readOnlyPort": 0,
                "healthzPort": 0,
                "authentication": {
                    "anonymous": {"enabled": False},
                    "webhook": {"enabled": False},
                    "x509": {"clientCAFile": str(files.ca)},
                },
                "authorization": {"mode": "AlwaysAllow"},  # whom the authority has signed
                "cgroupDriver": "cgroupfs",
                "cgroupRoot": f"/hotstage-{node.name}",
                "failCgroupV1": False,
                "failSwapOn": False,
                # version 2 of cgroups kills a whole container by default, version 1 never does
                "singleProcessOOMKill": True,
                "enforceNodeAllocatable": [],
                "localStorageCapacityIsolation": False,
                "evictionHard": {
                    "memory.available": "64Mi",
                    "nodefs.available": "1%",
                    "nodefs.inodesFree": "1%",
                    "imagefs.available": "1%",
                },
                "imageGCHighThresholdPercent": 100,
                "containerRuntimeEndpoint": f"unix://{node.socket}",
                "clusterDNS": [HOST],
                "clusterDomain": DOMAIN,
                "resolvConf": str(resolve),
                "podLogsDir": str(home / "logs"),
                "volumePluginDir": str(home / "volume-plugins"),
                "makeIPTablesUtilChains": False,
                "serializeImagePulls": False,
                "nodeStatusUpdateFrequency": "2s",
                "nodeStatusReportFrequency": "2s",
                "nodeLeaseDurationSeconds": 8,
                "syncFrequency": "10s",
                "registerNode": True,
                "maxPods": 100,
            },
            indent=1,
        )
    )
    ledger.start(
        f"kubelet-{node.name}",
        [
            *(*node.inside, str(kube), "kubelet", f"--config={config}", f"--kubeconfig={files.kubeconfig(node.name)}"),
            *(f"--node-ip={node.address}", f"--hostname-override={node.name}"),
            *(f"--root-dir={home / 'kubelet'}", f"--cert-dir={home / 'certificates'}"),
        ],
    )


def start_proxy(ledger: Ledger, kube: Path, files: Files, node: Node) -> None:
    """kube-proxy: what gives services their addresses, in a table of nftables that is its own."""
    home = ledger.scratch / node.name
    config = home / "proxy.json"
    config.write_text(
        json.dumps(
            {
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                "mode": "nftables",
                "bindAddress": node.address,
                "hostnameOverride": node.name,
                "clusterCIDR": PODS,
                "clientConnection": {"kubeconfig": str(files.kubeconfig("proxy"))},
                "healthzBindAddress": "",
                "metricsBindAddress": "127.0.0.1:28249",
                "nodePortAddresses": ["primary"],
                # the machine's own limits stay as they are
                "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            },
            indent=1,
        )
    )
    ledger.start(f"proxy-{node.name}", [*node.inside, str(kube), "proxy", f"--config={config}"])
