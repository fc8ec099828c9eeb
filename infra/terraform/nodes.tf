# Nodes of a release, made and removed by Karpenter: each pool is empty until a pod asks for it, and a node without pods is gone after two
# minutes. So when the idle guard takes a run to zero, its GPUs stop costing two minutes later, and `max_gpus` bounds what can ever run.
#
# Pools are Kubernetes objects. They come out as `cluster_manifests` (outputs.tf), to be applied once Karpenter runs.

# Spot interruptions (two minutes ahead), rebalance recommendations, scheduled maintenance and stopped instances, for Karpenter to drain.
resource "aws_sqs_queue" "interruption" {
  name                      = "${var.name}-interruption"
  message_retention_seconds = 300
  sqs_managed_sse_enabled   = true
}

resource "aws_sqs_queue_policy" "interruption" {
  queue_url = aws_sqs_queue.interruption.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Sid       = "Events"
        Effect    = "Allow"
        Principal = { Service = "events.amazonaws.com" }
        Action    = "sqs:SendMessage"
        Resource  = aws_sqs_queue.interruption.arn
        Condition = { ArnEquals = { "aws:SourceArn" = [for rule in aws_cloudwatch_event_rule.interruption : rule.arn] } }
      },
      {
        Sid       = "OnlyTls"
        Effect    = "Deny"
        Principal = "*"
        Action    = "sqs:*"
        Resource  = aws_sqs_queue.interruption.arn
        Condition = { Bool = { "aws:SecureTransport" = "false" } }
      },
    ]
  })
}

resource "aws_cloudwatch_event_rule" "interruption" {
  for_each = {
    spot-interruption = { source = "aws.ec2", type = "EC2 Spot Instance Interruption Warning" }
    rebalance         = { source = "aws.ec2", type = "EC2 Instance Rebalance Recommendation" }
    state-change      = { source = "aws.ec2", type = "EC2 Instance State-change Notification" }
    scheduled-change  = { source = "aws.health", type = "AWS Health Event" }
  }

  name          = "${var.name}-${each.key}"
  event_pattern = jsonencode({ source = [each.value.source], "detail-type" = [each.value.type] })
}

resource "aws_cloudwatch_event_target" "interruption" {
  for_each = aws_cloudwatch_event_rule.interruption

  rule = each.value.name
  arn  = aws_sqs_queue.interruption.arn
}

# EFA bypasses the operating system: it works between instances of one subnet, as near each other as EC2 can put them, whose security group
# allows everything to and from itself. Rules for addresses do not cover its traffic.
resource "aws_placement_group" "learner" {
  count = var.learner.efa ? 1 : 0

  name     = "${var.name}-learner"
  strategy = "cluster"
}

resource "aws_security_group" "efa" {
  count = var.learner.efa ? 1 : 0

  name        = "${var.name}-efa"
  description = "EFA between the nodes of the learner"
  vpc_id      = aws_vpc.this.id
}

resource "aws_vpc_security_group_ingress_rule" "efa" {
  count = var.learner.efa ? 1 : 0

  security_group_id            = aws_security_group.efa[0].id
  referenced_security_group_id = aws_security_group.efa[0].id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_egress_rule" "efa" {
  count = var.learner.efa ? 1 : 0

  security_group_id            = aws_security_group.efa[0].id
  referenced_security_group_id = aws_security_group.efa[0].id
  ip_protocol                  = "-1"
}

locals {
  cluster_security_group = aws_eks_cluster.this.vpc_config[0].cluster_security_group_id

  # Bottlerocket's NVIDIA images bring driver and device plugin, so nothing has to be installed for nvidia.com/gpu.
  node_class = {
    amiSelectorTerms           = [{ alias = "bottlerocket@latest" }]
    instanceProfile            = aws_iam_instance_profile.node.name
    securityGroupSelectorTerms = [{ id = local.cluster_security_group }]
    subnetSelectorTerms        = [for subnet in aws_subnet.private : { id = subnet.id }]
    metadataOptions            = { httpEndpoint = "enabled", httpTokens = "required", httpPutResponseHopLimit = 1 }
    tags                       = merge(local.tags, { Name = "${var.name}-node" })
    blockDeviceMappings = [
      { deviceName = "/dev/xvda", ebs = { volumeSize = "4Gi", volumeType = "gp3", encrypted = true, deleteOnTermination = true } },
      # Images (about 10 GB with CUDA), a model from the hub, caches. Faster than the default, since a GPU waits for it.
      { deviceName = "/dev/xvdb", ebs = { volumeSize = "200Gi", volumeType = "gp3", throughput = 500, encrypted = true, deleteOnTermination = true } },
    ]
  }

  node_classes = {
    sdar = local.node_class
    sdar-learner = merge(local.node_class, [for group in aws_placement_group.learner : {
      subnetSelectorTerms        = [{ id = aws_subnet.private[local.learner_zone].id }]
      securityGroupSelectorTerms = [{ id = local.cluster_security_group }, { id = aws_security_group.efa[0].id }]
      placementGroupSelector     = { name = group.name }
    }]...)
  }

  gpu_taint = { key = "nvidia.com/gpu", value = "present", effect = "NoSchedule" }
  cpu_types = {
    "karpenter.k8s.aws/instance-category"   = { operator = "In", values = ["c", "m"] }
    "karpenter.k8s.aws/instance-generation" = { operator = "Gt", values = ["5"] }
    "karpenter.k8s.aws/instance-cpu"        = { operator = "In", values = ["4", "8", "16"] }
  }

  is_learner_zonal = var.learner.efa || var.lustre_gib > 0 || var.learner.zone != null

  node_pools = {
    control = {
      node_class = "sdar"
      taints     = []
      limits     = { cpu = var.control_max_cpus }
      requirements = merge(local.cpu_types, {
        "karpenter.sh/capacity-type" = { operator = "In", values = ["on-demand"] }
      })
    }
    environments = {
      node_class = "sdar"
      taints     = [{ key = "sdar.dev/pool", value = "environments", effect = "NoSchedule" }]
      limits     = { cpu = var.environments.max_cpus }
      requirements = merge(local.cpu_types, {
        "karpenter.sh/capacity-type" = { operator = "In", values = var.environments.capacity_types }
      })
    }
    rollout = {
      node_class = "sdar"
      taints     = [local.gpu_taint]
      limits     = { "nvidia.com/gpu" = var.rollout.max_gpus }
      requirements = {
        "karpenter.sh/capacity-type"       = { operator = "In", values = var.rollout.capacity_types }
        "node.kubernetes.io/instance-type" = { operator = "In", values = var.rollout.instance_types }
      }
    }
    learner = {
      node_class = "sdar-learner"
      taints     = [local.gpu_taint]
      limits     = { "nvidia.com/gpu" = var.learner.max_gpus }
      requirements = merge(
        {
          "karpenter.sh/capacity-type"       = { operator = "In", values = ["on-demand"] }
          "node.kubernetes.io/instance-type" = { operator = "In", values = var.learner.instance_types }
        },
        { for zone in local.is_learner_zonal ? [local.learner_zone] : [] : "topology.kubernetes.io/zone" => { operator = "In", values = [zone] } },
      )
    }
  }

  node_class_manifests = [for name, spec in local.node_classes : {
    apiVersion = "karpenter.k8s.aws/v1"
    kind       = "EC2NodeClass"
    metadata   = { name = name }
    spec       = spec
  }]

  node_pool_manifests = [for name, pool in local.node_pools : {
    apiVersion = "karpenter.sh/v1"
    kind       = "NodePool"
    metadata   = { name = "sdar-${name}" }
    spec = {
      limits = pool.limits
      disruption = {
        consolidationPolicy = "WhenEmpty"
        consolidateAfter    = "2m"
        # Only empty nodes are taken away: never a running learner for a newer image or a tighter packing.
        budgets = [{ nodes = "100%", reasons = ["Empty"] }, { nodes = "0", reasons = ["Drifted", "Underutilized"] }]
      }
      template = {
        metadata = { labels = { "sdar.dev/pool" = name } }
        spec = {
          nodeClassRef = { group = "karpenter.k8s.aws", kind = "EC2NodeClass", name = pool.node_class }
          taints       = pool.taints
          # A node is at most a month old, for its security updates; what runs on it survives being moved.
          expireAfter            = "720h"
          terminationGracePeriod = "30m"
          requirements = [for key, requirement in merge({ "kubernetes.io/arch" = { operator = "In", values = ["amd64"] } }, pool.requirements) :
            { key = key, operator = requirement.operator, values = requirement.values }
          ]
        }
      }
    }
  }]
}
